"""Encoders: what transformers gives, the same bits whatever the budget, and one line where they are
asked for what only a model that writes can do."""

import json
import re
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import safetensors.numpy

from bench.cgroup import NoCgroups, run_limited
from conftest import DATA, ENCODER_DATA
from flashinfer import Model, UserError
from flashinfer.formats.bundle.reader import Bundle, verify
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import BudgetError, FormatError
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.plan.memory import MIB

NAMES = sorted(path.name for path in ENCODER_DATA.iterdir())
PARTS = ("hidden", "pooled", "logits")
IDS = [(i * 37 + 11) % 96 for i in range(40)]


def parts_of(encoding):
    """{"hidden", "pooled", "logits": those that there are}."""
    found = {part: getattr(encoding, part) for part in PARTS}
    return {part: values for part, values in found.items() if values is not None}


def same(one, other):
    return all(np.array_equal(one[part], other[part]) for part in one.keys() | other.keys())


def encoded(path, ids=IDS, **options):
    with Model.open(path, **options) as model:
        return parts_of(model.encode([ids], logits=model.config.has_head)[0])


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_those_of_transformers(name, tmp_path, twin):
    """Recorded by tests/make_checkpoints.py; the texts hold RoBERTa's padding, too."""
    path = tmp_path / "x.flash"
    convert(ENCODER_DATA / name, path, "f32")
    verify(path)
    recorded = dict(np.load(ENCODER_DATA / name / "encoded.npz"))
    found = encoded(path, recorded.pop("ids"))
    assert found.keys() == recorded.keys()
    for part, values in found.items():
        assert values.dtype == np.float32 and values.shape == recorded[part].shape
        assert np.abs(values - recorded[part]).max() < 1e-4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """One with a pooler and a head."""
    path = tmp_path_factory.mktemp("encoder") / "x.flash"
    convert(ENCODER_DATA / "bert-pretraining", path, "f32")
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A random BERT whose parts are some MB, so that a budget can leave them out."""
    folder = tmp_path_factory.mktemp("large")
    return folder / "x.flash", made(folder, 256, 4, 1024, 8000, 128)


def made(folder, d, layers, ffn, vocab, positions):
    """A random BERT with a head of masked tokens, as folder/x.flash in f16; its config."""
    random, tensors = np.random.default_rng(3), {}

    def linear(name, rows, columns):
        scale = np.float32(columns**-0.5)
        values = random.standard_normal((rows, columns), dtype=np.float32)
        tensors[f"{name}.weight"] = values * scale
        tensors[f"{name}.bias"] = random.standard_normal(rows, dtype=np.float32) / 8

    def norm(name):
        tensors[f"{name}.weight"] = 1 + random.standard_normal(d, dtype=np.float32) / 8
        tensors[f"{name}.bias"] = random.standard_normal(d, dtype=np.float32) / 8

    for name, rows in (("word", vocab), ("position", positions), ("token_type", 2)):
        values = random.standard_normal((rows, d), dtype=np.float32)
        tensors[f"bert.embeddings.{name}_embeddings.weight"] = values
    norm("bert.embeddings.LayerNorm")
    for layer in range(layers):
        base = f"bert.encoder.layer.{layer}"
        for p in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{base}.attention.{p}", d, d)
        norm(f"{base}.attention.output.LayerNorm")
        linear(f"{base}.intermediate.dense", ffn, d)
        linear(f"{base}.output.dense", d, ffn)
        norm(f"{base}.output.LayerNorm")
    linear("bert.pooler.dense", d, d)
    linear("cls.predictions.transform.dense", d, d)
    norm("cls.predictions.transform.LayerNorm")
    tensors["cls.predictions.bias"] = random.standard_normal(vocab, dtype=np.float32)
    config = {
        "model_type": "bert", "hidden_size": d, "num_hidden_layers": layers,
        "num_attention_heads": d // 64, "intermediate_size": ffn, "vocab_size": vocab,
        "max_position_embeddings": positions,
    }  # fmt: skip
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "hf" / "model.safetensors")
    convert(folder / "hf", folder / "x.flash", "f16")
    return config


def test_the_budget_changes_no_bit(large, constant_rss):
    """Neither what streams, nor threads, nor how it is read, nor a longer context."""
    path, config = large
    random = np.random.default_rng(1)
    ids = random.integers(0, config["vocab_size"], 100)
    expected = encoded(path, ids)
    with pytest.raises(BudgetError) as refused:
        encoded(path, ids, memory=1)
    least = refused.value.least
    with Model.open(path, memory=least) as model:
        plan = model.plan
        assert plan.attention_layers < config["num_hidden_layers"] and not any(plan.slots)
        assert plan.chunk == plan.context == 128  # texts are never cut
    for budget in (least, least + 4 * MIB, least + 12 * MIB):
        for options in ({}, {"threads": 3, "io": "threads"}, {"context": 100}, {"io": "buffered"}):
            assert same(encoded(path, ids, memory=budget, **options), expected), options


def test_the_plan_has_room_for_a_text_at_once(large, constant_rss):
    path, _ = large
    leasts = []
    for context in (8, 64, 128):
        with pytest.raises(BudgetError, match=f"context of {context} tokens") as refused:
            Model.open(path, memory=1, context=context)
        leasts.append(refused.value.least)
    assert leasts == sorted(leasts) and leasts[-1] > leasts[0]


def test_it_stays_under_its_budget(tmp_path):
    """In a memory cgroup of exactly the least that the command names."""
    made(tmp_path, 512, 4, 2048, 6000, 512)
    text = ",".join(map(str, np.random.default_rng(1).integers(0, 6000, 512)))
    command = [sys.executable, "-m", "flashinfer", "encode", str(tmp_path / "x.flash"),
               "--tokens", text, text]  # fmt: skip

    def limited(mib):
        return run_limited([*command, "--memory", f"{mib}M"], mib << 20, capture_output=True,
                           timeout=300)  # fmt: skip

    try:
        said = limited(40).stderr.decode()
        least = int(re.search(r"is too small; the least .* is (\d+)M", said)[1])
        runs = [limited(least), limited(least + 8)]
    except NoCgroups as why:
        pytest.skip(str(why))
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr.decode()
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout.split()) == 2 * 512


@pytest.mark.parametrize("name", ["f16", "bf16", "q8_0", "q4_0"])
def test_number_formats(name, tmp_path, bundle):
    path = tmp_path / "x.flash"
    convert(ENCODER_DATA / "bert-pretraining", path, name)
    exact, found = encoded(bundle), encoded(path, kv_dtype="f32")
    most = {"f16": 0.02, "bf16": 0.2, "q8_0": 0.2, "q4_0": 3}[name]
    assert 0 < np.abs(found["hidden"] - exact["hidden"]).max() < most
    with Bundle(path) as opened:
        assert opened.tensors["embed_types.weight"].format.name == "f32"


def test_several_texts_are_encoded_each_by_itself(bundle):
    with Model.open(bundle) as model:
        texts = [IDS[:1], IDS[:7], IDS, IDS[:7]]
        found = model.encode(texts)
        assert [encoding.token_ids for encoding in found] == texts
        assert all(encoding.logits is None for encoding in found)
        assert same(parts_of(found[1]), parts_of(found[3]))
        assert same(parts_of(found[2]), parts_of(model.encode([np.array(IDS)])[0]))
        assert not np.array_equal(found[1].hidden, found[2].hidden[:7])  # both directions
        assert model.encode([]) == []


@pytest.mark.parametrize("text, message", [
    ([1] * 49, "49 tokens does not fit the context of 48; the model's most is 48"),
    ([], "one or more whole numbers"), ([96], "96 is not within 0 to 95"), ([-1], "-1 is not"),
    ([1.5], "whole numbers"), (3, "whole numbers"), (None, "whole numbers"),
    ("abc", "has no tokenizer"),
])  # fmt: skip
def test_texts_that_are_refused(text, message, bundle):
    with Model.open(bundle) as model, pytest.raises(UserError, match=message):
        model.encode([text])


def test_one_string_is_not_a_list_of_texts(bundle):
    with Model.open(bundle) as model, pytest.raises(UserError, match="not one string"):
        model.encode("abc")


def test_what_a_model_lacks(tmp_path, plain):
    convert(ENCODER_DATA / "bert", tmp_path / "x.flash", "f32")
    with Model.open(tmp_path / "x.flash") as model:
        assert model.encode([IDS])[0].pooled.shape == (64,)
        with pytest.raises(UserError, match="no head of masked tokens"):
            model.encode([IDS], logits=True)
    with Model.open(plain) as model, pytest.raises(UserError, match="is no encoder"):
        model.encode([IDS])


def test_an_encoder_writes_nothing(bundle, tmp_path, plain):
    with Model.open(bundle) as model:
        for call in (
            lambda: list(model.generate(IDS)), lambda: list(model.generate_many([IDS])),
            lambda: model.logits(IDS), lambda: model.forward(IDS), lambda: model.forward([1]),
            lambda: list(model.forward_in_pieces(IDS)), lambda: model.trace(IDS, None),
            lambda: model.save_session(tmp_path / "x"), lambda: model.load_session(tmp_path / "x"),
        ):  # fmt: skip
            with pytest.raises(UserError, match=r"x\.flash: is an encoder, which writes no text"):
                call()
        assert model.encode([IDS])[0].hidden.shape == (40, 64)
    for call in (
        lambda: Model.open(bundle, texts=2), lambda: ModelWeights(bundle),
        lambda: ModelWeights(ENCODER_DATA / "bert"), lambda: Model.open(plain, draft=bundle),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"is an encoder|token ids are not those"):
            call()


def test_commands_refuse_it_in_one_line(bundle, cli, tmp_path):
    ids, prompts, trace = "5,17,60", tmp_path / "prompts", tmp_path / "t.safetensors"
    prompts.write_text('{"tokens": [5, 17], "max_tokens": 3}\n')
    trace.write_bytes(b"")
    page = tmp_path / "x.html"
    theirs = ["trace", ENCODER_DATA / "bert", "--engine", "transformers"]
    for command in (
        ["run", bundle, "--tokens", ids], ["trace", bundle, "--tokens", ids, "-o", page],
        *([[*theirs, "--tokens", ids, "-o", page]] if find_spec("torch") else []),
        ["digest", bundle, "--tokens", ids], ["compare", bundle, trace],
        ["batch", bundle, prompts, "-o", tmp_path / "out"],
        ["surrogate", bundle, "--prompts", prompts, "-o", tmp_path / "store"],
        ["watch", bundle, "--tokens", ids, "-o", page, "--device", "rpi5-nvme"],
        ["run", bundle, "--tokens", ids, "--session", tmp_path / "s"],
    ):  # fmt: skip
        code, out, err = cli(*command)
        assert code == 1 and "is an encoder, which writes no text" in err, (command, err)
        assert err.count("\n") == 1 and out == "" and not page.exists(), (command, out, err)


def test_commands_that_describe_it(bundle, cli, tmp_path):
    for command, said in (
        (["inspect", bundle], "an encoder: flashinfer encode"),
        (["plan", bundle, "--device", "rpi5-nvme"], "norms, biases"),
        (["verify", bundle], "every checksum is right"),
    ):
        code, out, err = cli(*command)
        assert code == 0 and said in out and "Traceback" not in err, err
    code, out, err = cli("convert", ENCODER_DATA / "bert", tmp_path / "x.flash")
    assert code == 0 and "Next: flashinfer encode" in err and "calibrate" not in err


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize("pooling", ["pooled", "first", "mean", "none", None])
def test_the_command(pooling, bundle, cli, tmp_path):
    ids = ",".join(map(str, IDS[:5]))
    options = [] if pooling is None else ["--pooling", pooling]
    code, out, err = cli("encode", bundle, "--tokens", ids, "3", *options)
    assert code == 0, err
    printed = np.array([line.split() for line in out.splitlines()], dtype=np.float32)
    with Model.open(bundle) as model:
        first, second = model.encode([IDS[:5], [3]])
    expected = {
        "pooled": [first.pooled, second.pooled], "first": [first.hidden[0], second.hidden[0]],
        "mean": [first.hidden.mean(axis=0), second.hidden[0]],
        "none": [*first.hidden, *second.hidden],
    }[pooling or "pooled"]  # fmt: skip
    assert np.array_equal(printed, np.stack(expected))
    code, out, _ = cli("encode", bundle, "--tokens", ids, "3", *options, "--json", "-")
    figures = json.loads(out)
    assert code == 0 and figures["texts"][0]["tokens"] == IDS[:5]
    found = [vector for text in figures["texts"] for vector in text["vectors"]]
    assert np.array_equal(np.array(found, np.float32), printed)


@pytest.fixture
def speaking(tmp_path):
    return speaking_encoder(tmp_path)


def speaking_encoder(folder):
    """The path of an encoder with a tokenizer, whose texts begin and end with a token."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[CLS]", "[SEP]", "[UNK]", *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    shutil.copytree(ENCODER_DATA / "bert-masked", folder / "speaking")
    made.save(str(folder / "speaking" / "tokenizer.json"))
    convert(folder / "speaking", folder / "speaking.flash", "f32")
    return folder / "speaking.flash"


def test_texts_of_letters(speaking, cli, tmp_path):
    with Model.open(speaking) as model:
        found = model.encode(["ab c", [0, 3, 14, 5, 1]])
        assert found[0].token_ids == [0, 3, 14, 5, 1] and found[0].pooled is None
        assert same(parts_of(found[0]), parts_of(found[1]))
        with pytest.raises(UserError, match="does not fit the context"):
            model.encode(["a " * 60])
    lines = tmp_path / "lines"
    lines.write_text("ab c\n\n  \njj\n")
    code, out, err = cli("encode", speaking, "--text", lines)
    assert code == 0 and len(out.splitlines()) == 2, err
    assert cli("encode", speaking, "-p", "ab c", "jj") == (0, out, err)
    code, _, err = cli("encode", speaking, "-p", "a", "--pooling", "pooled")
    assert code == 1 and "has no pooler" in err
    lines.write_text("a\n" + "a" * (1 << 20) + "\n")
    code, _, err = cli("encode", speaking, "--text", lines)
    assert code == 1 and "line 2 is too long" in err
    for command in (["run", speaking, "-p", "ab"], ["chat", speaking],
                    ["evaluate", speaking, "--text", lines], ["study", "modes", speaking],
                    ["calibrate", speaking, "--text", lines, "-o", tmp_path / "y"]):  # fmt: skip
        code, _, err = cli(*command)
        assert code in (1, 2) and "Traceback" not in err and err.count("error:") == 1, err
        assert not (tmp_path / "y").exists()


def test_the_command_refuses_a_model_that_writes(cli, plain):
    code, out, err = cli("encode", plain, "--tokens", "5")
    assert (code, out) == (1, "") and "is no encoder" in err and err.count("\n") == 1


# ---------------------------------------------------------------------- forms of checkpoints


def change(folder, by):
    path = folder / "model.safetensors"
    tensors = by(safetensors.numpy.load_file(path))
    safetensors.numpy.save_file({n: np.ascontiguousarray(v) for n, v in tensors.items()}, path)


def converted(folder):
    convert(folder, folder.parent / "x.flash", "f32")
    return (folder.parent / "x.flash").read_bytes()


OLD_NORMS = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
BIAS, DECODER = "cls.predictions.bias", "cls.predictions.decoder"
WORDS = "bert.embeddings.word_embeddings.weight"


def renamed(tensors):
    for new, old in OLD_NORMS.items():
        tensors = {name.replace(new, old): values for name, values in tensors.items()}
    return tensors


@pytest.mark.parametrize("form", [
    renamed,
    lambda found: {**found, "bert.embeddings.position_ids": np.arange(48)[None]},
    lambda found: {**found, f"{DECODER}.weight": found[WORDS], f"{DECODER}.bias": found[BIAS]},
    lambda found: {n: v for n, v in found.items() if "seq_relationship" not in n},
    lambda found: {(f"{DECODER}.weight" if n == WORDS else n): v for n, v in found.items()},
], ids=["gamma", "buffers", "copies", "one head", "tied the other way"])  # fmt: skip
def test_the_same_model_in_other_forms(form, checkpoint):
    folder = checkpoint("bert-pretraining")
    before = converted(folder)
    change(folder, form)
    assert converted(folder) == before


@pytest.mark.parametrize("form, message", [
    (lambda found: {**found, f"{DECODER}.bias": found[BIAS] + 1}, "bias differs from"),
    (lambda found: {**found, f"{DECODER}.weight": found[WORDS] + 1}, "weight differs from"),
    (lambda found: {**found, "bert.x": found[BIAS]}, "that bert does not have: bert.x"),
    (lambda found: {n: v for n, v in found.items() if n != BIAS}, "decoder.bias is missing"),
    (lambda found: {n: v for n, v in found.items() if "pooler.dense.bias" not in n},
     "pooler.dense.bias is missing"),
    (lambda found: {n: v for n, v in found.items() if "pooler.dense.weight" not in n},
     "does not have: bert.pooler.dense.bias"),
    (lambda found: {n: (v[:-1] if "position" in n else v) for n, v in found.items()},
     r"\(47, 64\), the config says \(48, 64\)"),
    (lambda found: {n: (v[:, :-1] if "token_type" in n else v) for n, v in found.items()},
     r"\(3, 63\), the config says \(3, 64\)"),
])  # fmt: skip
def test_checkpoints_that_are_refused(form, message, checkpoint):
    folder = checkpoint("bert-pretraining")
    change(folder, form)
    with pytest.raises(FormatError, match=message):
        converted(folder)
    assert not (folder.parent / "x.flash").exists()


def test_a_decoder_is_as_it_was(tmp_path):
    """What an encoder adds to a config is not there."""
    convert(DATA / "opt-plain", tmp_path / "x.flash", "f32")
    with Bundle(tmp_path / "x.flash") as bundle:
        assert not bundle.config.encoder and bundle.config.has_head
