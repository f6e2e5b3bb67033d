"""A trace holds what the engine computes, however the run is divided."""

import json

import numpy as np
import pytest

from conftest import DATA
from flashinfer import Model, UserError
from flashinfer.cli.main import main
from flashinfer.cli.run import demo_model
from flashinfer.formats.convert import convert
from flashinfer.oracle.digest import digest
from flashinfer.oracle.summary import summary_of
from flashinfer.oracle.trace import trace
from flashinfer.oracle.trace_file import Trace

# One of each kind of layer.
CHECKPOINTS = [
    DATA / name
    for name in (
        "opt-plain", "opt-post-norm-projected", "llama-silu", "qwen3", "falcon-7b",
        "falcon-rw-alibi", "phi3", "nemotron", "gemma2", "gpt-oss", "qwen2-moe-dense", "dots1",
        "granitemoe", "ernie4-5-moe", "nanochat", "bitnet",
    )
]  # fmt: skip
IDS = [(i * 37 + 11) % 90 + 3 for i in range(20)]


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=lambda p: p.name)
def bundle(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "x.flash"
    convert(request.param, path, "f32")
    return path


def test_every_value_is_told_and_the_logits_are_those_of_the_engine(bundle):
    with Model.open(bundle) as model:
        expected = model.logits(IDS)
        found = trace(model, IDS)
        again = model.logits(IDS)
        assert all(layer.tap is None and layer.mixer.tap is None for layer in model.layers)
    assert np.array_equal(found["logits"], expected)
    assert np.array_equal(again, expected)
    for name, array in found.items():
        assert len(array) == len(IDS), name
        assert array.dtype == np.uint8 or np.isfinite(array).all(), name


def test_the_trace_does_not_depend_on_how_tokens_are_grouped(bundle, tmp_path, monkeypatch):
    with Model.open(bundle) as model:
        trace(model, IDS, tmp_path / "a.safetensors")
        monkeypatch.setattr("flashinfer.opened.TRACED_BYTES", 1)  # one token at a time
        trace(model, IDS, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_summary_is_that_of_the_values(bundle, tmp_path, monkeypatch):
    with Model.open(bundle) as model:
        found = trace(model, IDS)
        monkeypatch.setattr("flashinfer.opened.TRACED_BYTES", 100_000)
        trace(model, IDS, tmp_path / "s.safetensors", summary=True)
    with Trace(tmp_path / "s.safetensors") as summaries:
        assert summaries.names == list(found)
        for name, array in found.items():
            expected = summary_of(name, array)
            assert summaries.digest(name) == expected.digest
            for what in ("moments", "sample"):
                assert np.array_equal(summaries.summary(name, what), getattr(expected, what))
    assert (tmp_path / "s.safetensors").stat().st_size < 120_000


def test_digests_are_those_of_the_trace(bundle):
    with Model.open(bundle) as model:
        found, values = digest(model, IDS), trace(model, IDS)
    layers = [name for name in found if name != "logits"]
    assert len(layers) == len(set(layers)) == model.config.num_hidden_layers
    for name, hash in found.items():
        assert hash == summary_of(name, values[name]).digest


def test_silent_neurons_of_the_demo_model():
    with Model.open(demo_model(), neurons="dense") as model:
        found = trace(model, IDS, only=["*.fc1", "*.fc2.input", "*.fc2.active"])
    for layer in range(model.config.num_hidden_layers):
        name = f"model.decoder.layers.{layer}"
        up, a = found[f"{name}.fc1"], found[f"{name}.fc2.input"]
        assert np.array_equal(a, np.maximum(up, 0))
        active = np.unpackbits(found[f"{name}.fc2.active"], axis=1, bitorder="little")
        assert np.array_equal(active[:, : a.shape[1]], a > 0)


def test_predicted_neurons_of_the_demo_model():
    with Model.open(demo_model(), neurons="predicted") as model:
        expected = model.logits(IDS)
        found = trace(model, IDS)
    assert np.array_equal(found["logits"], expected)
    name = "model.decoder.layers.0.fc2"
    predicted, active = (
        np.unpackbits(found[f"{name}.{what}"], axis=1) for what in ("predicted", "active")
    )
    assert active.any() and not (active & ~predicted).any()
    assert "model.decoder.layers.0.fc1" not in found


def test_some_values_at_some_positions(tmp_path):
    path = tmp_path / "t.safetensors"
    ids = ",".join(map(str, IDS))
    arguments = ["trace", str(demo_model()), "--tokens", ids, "-o", str(path)]
    more = ["--only", "*.self_attn.*", "--only", "logits", "--positions", "2,5-7"]
    assert main([*arguments, *more]) == 0
    with Model.open(demo_model()) as model:
        full = trace(model, IDS)
    with Trace(path) as found:
        assert found.positions.tolist() == [2, 5, 6, 7]
        assert all("self_attn." in name or name == "logits" for name in found.names)
        for name in found.names:
            assert np.array_equal(found.read(name), full[name][[2, 5, 6, 7]])


def test_the_file_is_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    with Model.open(demo_model()) as model:
        full = trace(model, IDS)
        trace(model, IDS, tmp_path / "t.safetensors")
    found = safetensors.load_file(tmp_path / "t.safetensors")
    assert found.keys() == full.keys()
    assert all(np.array_equal(found[name], full[name]) for name in full)


def test_wrong_wishes():
    with Model.open(demo_model()) as model:
        with pytest.raises(UserError, match="no value has such a name"):
            trace(model, IDS, only=["nothing"])
        with pytest.raises(UserError, match="positions 0 to 19"):
            trace(model, IDS, positions=[20])
        with pytest.raises(UserError, match="is not within"):
            trace(model, [10**6])


def test_the_digest_command(capsys):
    assert main(["digest", str(demo_model()), "--tokens", "5,6,7", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    with Model.open(demo_model()) as model:
        assert found["digests"] == digest(model, [5, 6, 7])
