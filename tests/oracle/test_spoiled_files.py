"""Sound files with a few bytes changed are used, or refused in one line; the seeds are fixed."""

import random
import warnings

import numpy as np
import pytest
from hostile import IDS, traced

SCRAPS = (b"0", b"9", b"-", b"[", b"]", b"{", b"}", b"(", b"'", b'"', b",", b"\n", b"")
MAP = f"""engine = "an engine"
arithmetic = "float32"
tokens = {IDS}
[names]
"head" = "logits"
"h{{}}" = "model.layers.{{}}"
"""
ARITHMETIC = """base = "llama.cpp"
keys = "f16"
scaled_queries = true
[products]
q4_0 = "q8_0"
"""


@pytest.fixture(autouse=True)
def no_warnings():
    """A warning would be a second line on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def spoil(raw, rng, first):
    """``raw`` with some bytes changed, removed or repeated, most of them in the ``first`` ones."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not raw:
            break
        at, n = rng.randrange(len(raw)), rng.randrange(1, 40)
        if rng.random() < 0.7:
            at = min(at, rng.randrange(first))
        kind = rng.randrange(5)
        if kind == 0:
            raw[at] = rng.randrange(256)
        elif kind == 1:
            raw[at : at + 1] = rng.choice(SCRAPS)
        elif kind == 2:
            del raw[at : at + n]
        elif kind == 3:
            raw[at:at] = raw[at : at + n]
        elif rng.random() < 0.3:
            del raw[at:]
    return bytes(raw)


def mend(raw, n_data):
    """A safetensors file whose header has the length that it says."""
    if len(raw) <= 8 + n_data:
        return raw
    return (len(raw) - 8 - n_data).to_bytes(8, "little") + raw[8:]


def use(cli, path, *args):
    """Whether a command that reads ``path`` refuses it; it may say what arrays it leaves out."""
    code, out, err = cli(*args)
    assert code in (0, 1) and err.count("\n") <= 1, err
    refused = err.startswith("flashinfer: error: ")
    assert refused or "left out" in err or err == ""
    if refused:
        assert code == 1 and out == "" and str(path) in err
    return refused


@pytest.mark.parametrize("kind", ["llama-silu", "mixtral", "summary"])
def test_traces(kind, cli, tmp_path):
    summary = kind == "summary"
    sound = traced("llama-silu" if summary else kind, tmp_path, summary=summary)
    raw, rng, file = sound.path.read_bytes(), random.Random(7), tmp_path / "t.safetensors"
    begin = 8 + int.from_bytes(raw[:8], "little")
    refusals = 0
    for number in range(150):
        spoiled = spoil(raw, rng, begin)
        file.write_bytes(mend(spoiled, len(raw) - begin) if number % 4 else spoiled)
        options = (["--html", tmp_path / "x.html"], ["--run"], ["--replace", "*.0"])[number % 3]
        refusals += use(cli, file, "compare", sound.model, file, *options)
    assert 20 < refusals < 150


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_arrays(suffix, cli, tmp_path):
    sound, rng = traced("llama-silu", tmp_path), random.Random(7)
    file, names = tmp_path / f"head{suffix}", tmp_path / "map.toml"
    names.write_text(MAP)
    if suffix == ".npy":
        np.save(file, sound.arrays["logits"])
    else:
        np.savez_compressed(file, head=sound.arrays["logits"], h1=sound.arrays["model.layers.1"])
    raw, refusals = file.read_bytes(), 0
    brings = ("trace", sound.model, "--from", file, "--map", names, "-o", tmp_path / "o")
    for _ in range(300):
        file.write_bytes(spoil(raw, rng, 128))
        refusals += use(cli, file, *brings)
    assert 100 < refusals < 300


def test_name_maps_and_arithmetics(cli, tmp_path):
    sound, rng = traced("llama-silu", tmp_path), random.Random(7)
    arrays, file = tmp_path / "x.npz", tmp_path / "x.toml"
    np.savez(arrays, head=sound.arrays["logits"], h1=sound.arrays["model.layers.1"])
    refusals = 0
    for number in range(200):
        text = (MAP, ARITHMETIC)[number % 2].encode()
        file.write_bytes(spoil(text, rng, len(text)))
        if number % 2:
            command = ("compare", sound.model, sound.path, "--arithmetic", file)
            refusals += use(cli, file, *command)
        else:
            # Where the map is sound and names none of the arrays, it is their file that is named.
            command = ("trace", sound.model, "--from", arrays, "--map", file, "-o", tmp_path / "o")
            refusals += use(cli, tmp_path, *command)
    assert 50 < refusals < 200
