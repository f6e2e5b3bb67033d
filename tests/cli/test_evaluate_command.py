"""``flashinfer evaluate``: what it prints and writes, and what it refuses in one line."""

import json

import numpy as np
import pytest

from completions_server import Echoing, LlamaCpp, serving
from flashinfer.cli.common import open_bundle, text_ids
from flashinfer.cli.evaluate_lines import modes_lines
from flashinfer.cli.run import demo_model
from flashinfer.study.divergence import perplexity_of
from flashinfer.study.modes import ModeResult, Modes
from flashinfer.text.tokenizer import Tokenizer

pytest.importorskip("tokenizers")
TEXT = "import os\n\n\ndef main(path):\n    return os.path.join(os.getcwd(), path)\n" * 8
QUESTIONS = [
    {"ctx": "def double(x):\n    return", "endings": ["x * 2", "import os"], "label": 0},
    {"ctx": "import", "endings": ["):", "os"], "label": "1"},
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return path


@pytest.fixture
def logits(tmp_path, text):
    """A file of logits of the text, which say nothing."""
    with open_bundle(demo_model(), None) as bundle:
        ids = text_ids(text, Tokenizer(bundle), 64)
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((len(ids), bundle.config.vocab_size), dtype=np.float32))
    return path


def test_the_modes_side_by_side(cli, text, tmp_path):
    file = tmp_path / "x.json"
    code, out, err = cli(
        "evaluate", demo_model(), "--text", text, "--tokens", 64, "--modes", "--json", file
    )
    assert code == 0, err
    figures = json.loads(file.read_text())
    modes = {mode["neurons"]: mode for mode in figures["modes"]}
    assert list(modes) == ["dense", "predicted", "ideal"] and figures["left_out"] is None
    assert modes["dense"]["distance"] is None
    assert modes["predicted"]["distance"]["kl_mean"] > modes["ideal"]["distance"]["kl_mean"] == 0
    assert len(figures["layers"]) == 6 and "layer 5: " in out
    for mode in modes.values():
        assert f"{mode['neurons']}: perplexity {mode['perplexity']:.4f} ± " in out


def test_the_command_alone_says_the_same(cli, text):
    found = {}
    for more in (["--modes"], ["--neurons", "predicted"]):
        code, out, err = cli(
            "evaluate", demo_model(), "--text", text, "--tokens", 64, *more, "--json", "-"
        )
        assert code == 0, err
        found[more[0]] = json.loads(out)
    predicted = found["--modes"]["modes"][1]
    for key in ("nats_per_token", "perplexity", "bits_per_byte"):
        assert predicted[key] == pytest.approx(found["--neurons"][key])


def test_against_a_file(cli, text, logits, tmp_path):
    file = tmp_path / "x.json"
    code, out, err = cli(
        "evaluate", demo_model(), "--text", text, "--tokens", 64, "--against", logits,
        "--neurons", "dense", "--json", file,
    )  # fmt: skip
    assert code == 0, err
    figures = json.loads(file.read_text())
    assert figures["other"]["perplexity"] == pytest.approx(4096)
    assert figures["base"]["perplexity"] < 100 and figures["named"] is None
    assert "this model, dense: perplexity" in out and f"{logits}: perplexity 4096.0000" in out


@pytest.mark.parametrize("kind", [Echoing, LlamaCpp])
def test_against_a_server(cli, text, kind):
    def uniform(ids):
        return np.full((len(ids), 4096), -np.log(4096)).tolist()

    with serving(kind(uniform)) as url:
        code, out, err = cli(
            "evaluate", demo_model(), "--text", text, "--tokens", 24, "--against", url, "--top", 9
        )
    assert code == 0, err
    assert "the server named " in out and "at least this" in out
    known = "perplexity 4096.0000" if kind is Echoing else "perplexity unknown"
    assert f"{url}: {known}" in out


def test_modes_that_do_not_exist_are_said():
    one = ModeResult("dense", perplexity_of([1.0, 2.0]), None)
    assert modes_lines(Modes(2, [one], [], "there are no predictors")) == [
        "over 2 tokens, each figure with its standard error:",
        "dense: perplexity 4.4817 ± 2.2408 a token",
        "no other modes: there are no predictors",
    ]


def test_choices(cli, questions, tmp_path):
    file = tmp_path / "x.json"
    code, out, err = cli("evaluate", demo_model(), "--choices", questions, "--json", file)
    assert code == 0, err
    figures = json.loads(file.read_text())
    assert (figures["questions"], figures["accuracy"]) == (2, 1)
    assert out.startswith("predicted: accuracy 100.00 ± 0.00 %")


BAD_TEXTS = {
    "nothing": (b"", "a text of at least 2 tokens is needed"),
    "one token": (b"x", "a text of at least 2 tokens is needed"),
    "no UTF-8": (b"def \xff\xfe", "is not UTF-8 text"),
}


@pytest.mark.parametrize("more", [[], ["--modes"]])
@pytest.mark.parametrize("what", BAD_TEXTS)
def test_texts_that_are_refused(cli, tmp_path, what, more):
    raw, message = BAD_TEXTS[what]
    path = tmp_path / "text.py"
    path.write_bytes(raw)
    code, out, err = cli("evaluate", demo_model(), "--text", path, *more)
    assert code == 1 and out == ""
    assert err.startswith("flashinfer: error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1: cannot be asked"),
        (["--against", "/nowhere/x.npy"], "/nowhere/x.npy: No such file"),
        (["--modes", "--neurons", "dense"], "leave --neurons away"),
    ],
)
def test_what_cannot_be_compared(cli, text, arguments, message):
    code, out, err = cli("evaluate", demo_model(), "--text", text, *arguments)
    assert code == 1 and out == "" and err.count("\n") == 1 and message in err


def test_logits_of_another_text(cli, text, logits):
    code, _, err = cli(
        "evaluate", demo_model(), "--text", text, "--tokens", 63, "--against", logits
    )
    assert code == 1 and "(63, 4096)" in err and err.count("\n") == 1


def test_a_malformed_question(cli, questions):
    questions.write_text(questions.read_text() + "\n{}")
    code, _, err = cli("evaluate", demo_model(), "--choices", questions)
    assert code == 1 and f"{questions}: line 3: is not a question" in err


@pytest.mark.parametrize(
    "arguments",
    [[], ["--text", "x", "--choices", "y"], ["--text", "x", "--modes", "--against", "y"]],
)
def test_usage(cli, arguments):
    assert cli("evaluate", demo_model(), *arguments)[0] == 2


def test_choices_have_no_modes(cli, questions):
    code, _, err = cli("evaluate", demo_model(), "--choices", questions, "--modes")
    assert code == 1 and "not --choices" in err
