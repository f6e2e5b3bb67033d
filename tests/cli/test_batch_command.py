"""flashinfer batch and flashinfer surrogate: lines in, lines out, stopped and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from flashinfer import Model
from flashinfer.cli.batch_lines import MOST_LINE, Settings, WrongLine, lines_of
from flashinfer.cli.run import demo_model
from flashinfer.generation.store import Store

pytest.importorskip("tokenizers")
DEMO = str(demo_model())
LINES = [
    {"prompt": "import os\n\ndef main(", "id": "first\ud800"},
    {"tokens": [5, 6, 7], "temperature": 0, "max_tokens": 9},
    {"prompt": "import os\n\nimport sys\n", "seed": 4, "top_k": 5},
    {"prompt": "", "max_tokens": 3},
    {"prompt": "class Foo:\n", "temperature": 0.5, "top_p": 0.9, "seed": 18446744073709551615},
]


def written(path):
    """{line: the object} of an output."""
    objects = [json.loads(line) for line in path.read_text().splitlines()]
    return {entry["line"]: entry for entry in objects}


def prompts(folder, lines=LINES):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_each_line_is_the_text_that_it_is_alone(cli, tmp_path):
    source, out, figures = prompts(tmp_path), tmp_path / "out.jsonl", tmp_path / "f.json"
    code, _, err = cli("batch", DEMO, source, "-o", out, "-n", 12, "-s", 3, "--json", figures)
    assert code == 0, err
    found = written(out)
    assert found[1]["id"] == "first\ud800" and len(found) == 5
    for number, line in enumerate(LINES, start=1):
        part = (
            ["--tokens", ",".join(map(str, line["tokens"]))]
            if "tokens" in line
            else ["-p", line["prompt"]]
        )
        settings = {"-n": line.get("max_tokens", 12), "-s": line.get("seed", 3)}
        settings |= {"--temp": line.get("temperature", 0.8), "--top-k": line.get("top_k", 40)}
        settings["--top-p"] = line.get("top_p", 0.95)
        options = [word for pair in settings.items() for word in pair]
        code, text, err = cli("run", DEMO, *part, *options, "--json", tmp_path / "one.json")
        assert code == 0, err
        alone = json.loads((tmp_path / "one.json").read_text())["token_ids"]
        assert found[number]["token_ids"] == alone
        if "tokens" not in line:
            assert line["prompt"] + found[number]["text"] == text.removesuffix("\n")
    told = json.loads(figures.read_text())
    assert told["texts"] == 5 and told["generated_tokens"] == sum(
        len(entry["token_ids"]) for entry in found.values()
    )


def test_wrong_lines_are_named_and_the_others_written(cli, tmp_path):
    source, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    wrong = [
        (b"not json", "is not a JSON object"),
        (b"[1]", "is not a JSON object"),
        (b"{}", 'needs one of "prompt" and "tokens"'),
        (b'{"prompt": "x", "tokens": [5]}', 'needs one of "prompt" and "tokens"'),
        (b'{"prompt": 3}', '"prompt" is not a text'),
        (b'{"tokens": [5, -1]}', "is not a list of token ids"),
        (b'{"tokens": []}', "the prompt is empty"),
        (b'{"tokens": [5, 70000]}', "token id 70000 is not below 4096"),
        (b'{"prompt": "x", "max_tokens": 0}', "max_tokens '0' is out of range"),
        (b'{"prompt": "x", "temperature": -1}', "temperature '-1' is out of range"),
        (b'{"prompt": "x", "temperature": NaN}', "line"),
        (b'{"prompt": "x", "top_p": 0}', "top_p '0' is out of range"),
        (b'{"prompt": "x", "seed": 1.5}', "seed '1.5' is out of range"),
        (b'{"prompt": "x", "stop": "y"}', "unknown key 'stop'"),
        (b'{"prompt": "x", "prompt": "y"}', "line"),
        (b'{"prompt": "\\ud800"}', "is not UTF-8 text"),
        (b'{"prompt": "\xff"}', "line"),
        (b'{"tokens": [5], "max_tokens": 100000}', "do not fit the context"),
        (b"[" * 100000, "line"),
    ]
    good = b'{"tokens": [5, 6], "max_tokens": 2}'
    source.write_bytes(b"\n".join([good, *(line for line, _ in wrong), b"", good]))
    code, _, err = cli("batch", DEMO, source, "-o", out)
    assert code == 1 and "Traceback" not in err
    for number, (_, says) in enumerate(wrong, start=2):
        named = next(line for line in err.splitlines() if f": line {number}: " in line)
        assert says in named
    assert err.splitlines()[-1].endswith(f"{len(wrong)} lines are wrong, and have no text")
    assert sorted(written(out)) == [1, len(wrong) + 3]


def test_a_line_that_is_too_long_is_left_out(tmp_path):
    source, default = tmp_path / "x.jsonl", Settings(5, 0.0, 0, 1.0, None)
    good = b'{"tokens": [5]}\n'
    source.write_bytes(good + b'{"prompt": "' + b"x" * MOST_LINE + b'"}\n' + good)
    found = list(lines_of(str(source), default))
    assert [line.number for line in found] == [1, 2, 3]
    assert isinstance(found[1], WrongLine) and "bytes" in found[1].why


@pytest.mark.parametrize("cut", [0, 1, 30, 200, 10_000])
def test_a_run_that_was_stopped_is_gone_on_with(cli, tmp_path, cut):
    """Wherever it was cut; what is there is not written again."""
    source, out = prompts(tmp_path), tmp_path / "out.jsonl"
    arguments = ("batch", DEMO, source, "-o", out, "-n", 12, "-s", 3)
    assert cli(*arguments)[0] == 0
    whole, raw = written(out), out.read_bytes()
    out.write_bytes(raw[: max(0, len(raw) - cut)])
    code, _, err = cli(*arguments)
    assert code == 0 and f"{out}: 5 texts" in err
    assert written(out) == whole
    code, _, _ = cli(*arguments, "--json", tmp_path / "figures.json")
    told = json.loads((tmp_path / "figures.json").read_text())
    assert code == 0 and (told["texts"], told["skipped"], told["wrong"]) == (0, 5, 0)


def test_killed_and_started_again(cli, tmp_path):
    lines = [{"tokens": [5 + n], "max_tokens": 40} for n in range(400)]
    source, out = prompts(tmp_path, lines), tmp_path / "out.jsonl"
    arguments = ["batch", DEMO, str(source), "-o", str(out), "--temp", "0", "--texts", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flashinfer", *arguments], stderr=subprocess.DEVNULL
    )
    while process.poll() is None and (not out.exists() or out.stat().st_size < 2000):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = out.read_bytes().count(b"\n")
    code, _, err = cli(*arguments)
    assert code == 0 and f"texts       {400 - there} written" in err
    found = written(out)
    assert sorted(found) == list(range(1, 401))
    with Model.open(DEMO, context=64) as model:
        for number in (1, there, 400):
            ids = list(model.generate([4 + number], 40, 0))
            assert found[number]["token_ids"] == ids


def test_outputs_of_something_else_are_refused(cli, tmp_path):
    source, out = prompts(tmp_path), tmp_path / "out.jsonl"
    assert cli("batch", DEMO, source, "-o", out, "-n", 3, "--temp", 0)[0] == 0
    raw = out.read_bytes()
    code, _, err = cli("batch", DEMO, source, "-o", out, "-n", 4, "--temp", 0)
    assert code == 1 and "was written with another prompt, model or settings" in err
    assert out.read_bytes() == raw
    out.write_bytes(b"a text\n")
    code, _, err = cli("batch", DEMO, source, "-o", out)
    assert code == 1 and "line 1 was not written by flashinfer batch" in err
    assert out.read_bytes() == b"a text\n"
    code, _, err = cli("batch", DEMO, source, "-o", source)
    assert code == 1 and "name another" in err
    code, _, err = cli("batch", DEMO, tmp_path / "missing", "-o", tmp_path / "new.jsonl")
    assert code == 1 and "missing" in err


def test_a_full_disk_leaves_whole_lines(tmp_path):
    source, out = (
        prompts(tmp_path, [{"tokens": [5], "max_tokens": 30}] * 40),
        tmp_path / "out.jsonl",
    )
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500));"
        "from flashinfer.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "batch", DEMO, str(source), "-o", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 1 and "cannot be written: File too large" in run.stderr
    assert "Traceback" not in run.stderr
    assert out.stat().st_size <= 1500 and 0 < len(written(out)) < 40


def test_a_surrogate_drafts_what_the_model_wrote(cli, tmp_path):
    source, store, figures = prompts(tmp_path), tmp_path / "x.store", tmp_path / "f.json"
    code, _, err = cli(
        "surrogate",
        DEMO,
        "--prompts",
        source,
        "-o",
        store,
        "-n",
        20,
        "--temp",
        0,
        "--json",
        figures,
    )
    assert code == 0, err
    assert json.loads(figures.read_text())["texts"] == 5
    assert Store(store, 4096).vocabulary
    arguments = ("run", DEMO, "-p", "class Foo:\n", "-n", 20, "--temp", 0.5, "-s", 4)
    assert cli(*arguments, "--draft", store)[1] == cli(*arguments, "--draft", "off")[1]
    code, _, err = cli("surrogate", DEMO, "--prompts", tmp_path / "missing", "-o", store)
    assert code == 1 and "missing" in err
    (tmp_path / "bad.jsonl").write_text("{}\n")
    code, _, err = cli("surrogate", DEMO, "--prompts", tmp_path / "bad.jsonl", "-o", store)
    assert code == 1 and "1 lines are wrong" in err
