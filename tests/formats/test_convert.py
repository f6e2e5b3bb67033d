import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from conftest import DATA
from flashinfer import Model
from flashinfer.formats.bundle.reader import Bundle, verify
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.sources.tokenizers.vocabulary import tokenizer_json

NAMES = sorted(path.name for path in DATA.iterdir() if path.name != "opt-bin")


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, tmp_path, twin):
    """Recorded by tests/make_checkpoints.py; bfloat16 weights are exact in f32."""
    path = tmp_path / "x.flash"
    convert(DATA / name, path, "f32")
    verify(path)
    recorded = np.load(DATA / name / "logits.npz")
    with Model.open(path, context=len(recorded["ids"])) as model:
        logits = model.logits(recorded["ids"])
        model.reset()
        single = np.stack([model.forward([token]) for token in recorded["ids"]])
    assert np.array_equal(single, logits)  # in one piece and token by token
    assert np.abs(logits - recorded["logits"]).max() < 1e-4


def test_pytorch_bin(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "x.flash"
    convert(DATA / "opt-bin", path, "f32")
    recorded = np.load(DATA / "opt-bin" / "logits.npz")
    with Model.open(path) as model:
        assert np.abs(model.logits(recorded["ids"]) - recorded["logits"]).max() < 1e-4


def test_pytorch_bin_runs_no_code(checkpoint, tmp_path):
    """A pickle that would create a file is refused, not run."""
    torch = pytest.importorskip("torch")

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    folder = checkpoint("opt-bin")
    torch.save({"a": Attack()}, folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin"):
        convert(folder, tmp_path / "x.flash")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("dtype, tolerance", [("f16", 0.05), ("bf16", 0.5)])
def test_shorter_formats_are_near(dtype, tolerance, tmp_path, twin):
    path = tmp_path / "x.flash"
    convert(DATA / "opt-plain", path, dtype)
    recorded = np.load(DATA / "opt-plain" / "logits.npz")
    with Model.open(path) as model:
        difference = np.abs(model.logits(recorded["ids"]) - recorded["logits"]).max()
    assert 0 < difference < tolerance * np.abs(recorded["logits"]).max()


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_rows_of_no_whole_blocks(name, tmp_path):
    """The small checkpoint's hidden size is 40."""
    with pytest.raises(UserError, match=f"{name} needs rows of a multiple of 32, not 40"):
        convert(DATA / "opt-plain", tmp_path / "x.flash", name)


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FC1 = "model.decoder.layers.0.fc1.weight"
SPOILED = {
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(FC1)), "fc1.weight is missing"),
    "extra tensor": (
        lambda f: change_tensors(f, lambda t: t.update(extra=np.zeros(3))),
        "does not have: extra",
    ),
    "misshapen tensor": (
        lambda f: change_tensors(f, lambda t: t.update({FC1: np.zeros((71, 40), np.float32)})),
        "has the shape",
    ),
    "integers": (
        lambda f: change_tensors(f, lambda t: t.update({FC1: np.zeros((72, 40), np.int32)})),
        "I32",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "architecture": (lambda f: change_config(f, model_type="t5"), "'t5' is not supported"),
    "dimension": (lambda f: change_config(f, ffn_dim="72"), "ffn_dim"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights here"),
    "vocabulary": (lambda f: change_config(f, vocab_size=95), "embed_tokens"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("nonsense"), "tokenizer.json"),
}


@pytest.mark.parametrize("spoil, says", SPOILED.values(), ids=SPOILED)
def test_spoiled_checkpoint_is_one_line(checkpoint, tmp_path, spoil, says):
    folder = checkpoint()
    spoil(folder)
    with pytest.raises(FormatError, match=says) as caught:
        convert(folder, tmp_path / "x.flash")
    assert "opt-plain" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "x.flash").exists()


def test_shards_that_lie(checkpoint, tmp_path):
    folder = checkpoint("opt-sharded")
    index = folder / "model.safetensors.index.json"
    for weight_map in ({"a": "../outside.safetensors"}, {"a": "none.safetensors"}, {"a": 3}, []):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FormatError):
            convert(folder, tmp_path / "x.flash")


def test_source_that_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "none"):
        with pytest.raises(FormatError, match="directory of a Hugging Face checkpoint"):
            convert(tmp_path / name, tmp_path / "x.flash")


def test_too_large_for_f16(checkpoint, tmp_path):
    folder = checkpoint()
    change_tensors(folder, lambda t: t.update({FC1: np.full((72, 40), 1e9, np.float32)}))
    with pytest.raises(UserError, match=r"layers\.0\.ffn\.bundles.*bf16"):
        convert(folder, tmp_path / "x.flash", "f16")


def test_bundles_hold_up_rows_and_down_columns(plain):
    tensors = safetensors.numpy.load_file(DATA / "opt-plain" / "model.safetensors")
    with Bundle(plain) as bundle:
        rows = bundle.read("layers.1.ffn.bundles")
    assert np.array_equal(rows[:, :40], tensors["model.decoder.layers.1.fc1.weight"])
    assert np.array_equal(rows[:, 40:], tensors["model.decoder.layers.1.fc2.weight"].T)


def test_vocabulary_and_merges_make_a_tokenizer(tmp_path):
    """As GPT-2's tokenizer: byte-level pieces, a beginning-of-text token where configured."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["</s>", "<pad>", *letters, "he", "hel", "Ġhe"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nhe l\nĠ he\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "</s>"}, "add_bos_token": True})
    )
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json(tmp_path))
    ids = tokenizer.encode("hello he é").ids
    assert ids[0] == vocab["</s>"] and ids[1] == vocab["hel"] and vocab["Ġhe"] in ids
    assert tokenizer.decode(ids) == "hello he é"
    (tmp_path / "merges.txt").write_text("h e l\n")
    with pytest.raises(FormatError, match=r"merges\.txt"):
        tokenizer_json(tmp_path)


def big_checkpoint(folder, layers, hidden=1024, ffn=4096):
    """A checkpoint of some size in zeros, written without holding it."""
    folder.mkdir()
    config = json.loads((DATA / "opt-plain" / "config.json").read_text())
    config.update(hidden_size=hidden, ffn_dim=ffn, num_hidden_layers=layers,
                  word_embed_proj_dim=hidden, num_attention_heads=16)  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    entries, offset = {}, 0
    pattern = safetensors.numpy.load_file(DATA / "opt-plain" / "model.safetensors")
    sizes = {40: hidden, 72: ffn}
    for name, tensor in pattern.items():
        layer = ".layers.0." in name
        if ".layers.1." in name:
            continue
        shape = [sizes.get(n, n) for n in tensor.shape]
        for i in range(layers if layer else 1):
            end = offset + 4 * int(np.prod(shape))
            entries[name.replace(".layers.0.", f".layers.{i}.")] = {
                "dtype": "F32", "shape": shape, "data_offsets": [offset, end],
            }  # fmt: skip
            offset = end
    header = json.dumps(entries).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    return folder


def test_memory_stays_bounded(tmp_path):
    """400 MB in, and less than the promised 300 MB plus the largest tensor held."""
    folder = big_checkpoint(tmp_path / "big", layers=8)
    code = (
        "from flashinfer.plan.memory import peak_rss;"
        "from flashinfer.formats.convert import convert;"
        f"convert({str(folder)!r}, {str(tmp_path / 'x.flash')!r}, 'f16');"
        "print(peak_rss())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 200e6


def test_a_kill_halfway_leaves_nothing(tmp_path):
    folder = big_checkpoint(tmp_path / "big", layers=8)
    target = tmp_path / "out"
    target.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "flashinfer", "convert", str(folder), str(target / "x.flash")],
        stderr=subprocess.DEVNULL,
    )
    counters = Path(f"/proc/{process.pid}/io")
    while process.poll() is None:
        if int(counters.read_text().split("wchar:")[1].split()[0]) > 20e6:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    assert not (target / "x.flash").exists()


def test_a_file_too_large_is_one_line(tmp_path):
    """As on a full disk: the kernel refuses a write in the middle."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536));"
        "from flashinfer.cli.main import main;"
        f"sys.exit(main(['convert', {str(DATA / 'opt-plain')!r}, {str(tmp_path / 'x.flash')!r}]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "cannot be written: File too large" in run.stderr
    assert os.listdir(tmp_path) == []
