"""Checkpoints of BitNets: what their bytes stand for, and what is wrong with some."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from ternary_checkpoints import FORMS, make, packed

from flashinfer.formats import bitnet
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import convert, outline
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.sources.checkpoint import Checkpoint

PARTS = {"q_proj": "self_attn.q_proj", "o_proj": "self_attn.o_proj"}


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_bytes_hold_four_rows(seed, m, columns):
    weights = np.random.default_rng(seed).integers(-1, 2, (4 * m, columns))
    rows = [bitnet.unpacked(packed(weights), quarter) for quarter in range(4)]
    assert np.array_equal(np.concatenate(rows), weights)


@pytest.mark.parametrize("form", FORMS)
def test_any_rows_and_columns(form, tmp_path):
    folder, weights = make(tmp_path / "hf", form, hidden_size=24, neurons=40, biases=True)
    with Checkpoint(folder) as checkpoint:
        for name, expected in weights.items():
            assert checkpoint.shapes[name] == expected.shape
            for start, stop in ((0, None), (0, 1), (3, 17), (5, 6), (7, 7), (11, 400)):
                found = checkpoint.read_rows(name, start, stop)
                assert np.array_equal(found, expected[start:stop]), (name, start, stop)
            if expected.ndim == 2:
                columns = np.concatenate(list(checkpoint.read_columns(name)))
                assert np.array_equal(columns, expected.T)
        assert not any(name.endswith("_scale") for name in checkpoint.shapes)


@pytest.mark.parametrize("form", FORMS)
def test_files_of_pytorch_hold_the_same(form, tmp_path):
    torch = pytest.importorskip("torch")
    folder, weights = make(tmp_path / "hf", form, hidden_size=24, neurons=40)
    stored = load_file(folder / "model.safetensors")
    torch.save({n: torch.from_numpy(v) for n, v in stored.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with Checkpoint(folder) as checkpoint:
        for name, expected in weights.items():
            assert np.array_equal(checkpoint.read_rows(name, 2, 5), expected[2:5])
            if expected.ndim == 2:
                columns = np.concatenate(list(checkpoint.read_columns(name)))
                assert np.array_equal(columns, expected.T)


@pytest.mark.parametrize("kind", ["bitnet", "llama"])
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_kept_by_themselves(form, kind, tmp_path):
    """Without --dtype a matrix is ternary in the bundle, too: its scale is that of the checkpoint
    where float16 holds it, and the nearest otherwise."""
    folder, weights = make(tmp_path / "hf", form, kind)
    size = convert(folder, tmp_path / "x.flash")
    with Bundle(tmp_path / "x.flash") as bundle:
        alike = kind == "bitnet"  # whose neurons are silent, and lie one by one
        assert bundle.ffn_formats == ("tq2_0" if alike else "tq2_0,tq2_0,tq2_0")
        for ours, theirs in PARTS.items():
            name = f"layers.1.{ours}.weight"
            assert bundle.tensors[name].format.name == "tq2_0"
            found, expected = bundle.read(name), weights[f"model.layers.1.{theirs}.weight"]
            assert np.array_equal(np.sign(found), np.sign(expected))
            assert np.allclose(found, expected, rtol=0 if "packed" in form else 2**-11, atol=0)
        gate, up, down = (
            weights[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up", "down")
        )
        expected = np.concatenate([gate, up, down.T], axis=1)
        if not alike:
            expected = np.concatenate([part.reshape(-1) for part in (gate, up, down)])
        units = bundle.read("layers.1.ffn.bundles").reshape(expected.shape)
        assert np.allclose(units, expected, rtol=0 if "packed" in form else 2**-11, atol=0)
        assert all(layer.ffn.rounded and layer.mixer.rounded for layer in bundle.config.layers)
    config = json.loads((folder / "config.json").read_text())
    assert abs(outline(config, tmp_path / "y.flash") - size) < 16_384


def test_rows_of_no_whole_blocks_have_16_bits(tmp_path):
    folder, weights = make(tmp_path / "hf", "packed", "llama", hidden_size=256, neurons=320)
    convert(folder, tmp_path / "x.flash")
    with Bundle(tmp_path / "x.flash") as bundle:
        assert bundle.ffn_formats == "tq2_0,tq2_0,f16"
    convert(folder, tmp_path / "y.flash", "f32")
    with Bundle(tmp_path / "y.flash") as bundle:
        found = bundle.read("layers.0.v_proj.weight")
        assert np.array_equal(found, weights["model.layers.0.self_attn.v_proj.weight"])


def changed_config(folder, **fields):
    """The checkpoint, with other fields in its quantization_config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(fields)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "fields",
    [
        {"linear_class": "other"}, {"linear_class": None}, {"quantization_mode": ["online"]},
        {"use_rms_norm": True}, {"modules_to_not_convert": []},
        {"modules_to_not_convert": ["model.layers.0.mlp.down_proj"]},
    ],
    ids=str,
)  # fmt: skip
def test_other_forms_are_refused(fields, tmp_path, cli):
    folder, _ = make(tmp_path / "hf", "packed")
    changed_config(folder, **fields)
    code, _, err = cli("convert", folder, tmp_path / "x.flash")
    assert code == 1 and "config.json" in err and next(iter(fields)) in err, err
    assert err.count("\n") == 1


def spoiled(change):
    """What a change of {name: array} does to a checkpoint."""

    def spoil(folder):
        arrays = load_file(folder / "model.safetensors")
        change(arrays, "model.layers.1.mlp.up_proj.weight")
        save_file(arrays, folder / "model.safetensors")

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        spoiled(lambda a, name: a.pop(f"{name}_scale")),
        spoiled(lambda a, name: a.update({f"{name}_scale": np.ones(2, np.float32)})),
        spoiled(lambda a, name: a.update({f"{name}_scale": np.ones(0, np.float32)})),
        spoiled(lambda a, name: a.update({f"{name}_scale": np.ones(1, np.uint8)})),
        spoiled(lambda a, name: a.update({name: a[name][:-1].copy()})),
        spoiled(lambda a, name: a.update({name: a[name][:, :-1].copy()})),
        spoiled(lambda a, name: a.update({name: a[name].astype(np.int8)})),
        spoiled(lambda a, name: a.update({name: a[name].astype(np.float32)})),
        spoiled(lambda a, name: a.update({name: a[name].reshape(2, -1, a[name].shape[1])})),
        spoiled(lambda a, name: a.pop(name)),
    ],
    ids=["no scale", "two scales", "empty scale", "a byte for a scale", "short", "narrow", "int8",
         "a quarter of floats", "3-D", "missing"],
)  # fmt: skip
def test_spoiled_tensors_are_named(spoil, tmp_path):
    folder, _ = make(tmp_path / "hf", "packed")
    spoil(folder)
    with pytest.raises(FormatError, match="up_proj"):
        convert(folder, tmp_path / "x.flash")
    assert not (tmp_path / "x.flash").exists()


@pytest.mark.parametrize("value", [np.inf, np.nan, 0, 3e38, 1e-45, -1e30])
@pytest.mark.parametrize("form", FORMS)
def test_scales_beyond_a_format(form, value, tmp_path):
    """Give what is not finite, or one line; and no warning."""
    folder, _ = make(tmp_path / "hf", form, neurons=256)
    arrays, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    arrays[name if form == "online" else f"{name}_scale"].reshape(-1)[0] = value
    save_file(arrays, folder / "model.safetensors")
    for dtype in (None, "f32", "q4_K", "mxfp4"):
        path = tmp_path / f"{dtype}.flash"
        try:
            convert(folder, path, dtype)
        except UserError as error:
            assert "layers.1.ffn" in str(error) and "\n" not in str(error)
            continue
        with Bundle(path) as bundle, np.errstate(all="ignore"):
            found = bundle.read("layers.1.ffn.bundles")
        odd = not np.isfinite(value) or (value == 0 and form == "divided")
        assert np.isfinite(found).all() != odd or form in ("online", "divided")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2", "n_embd": 256, "n_head": 4},
        {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
        {"model_type": "bert"},
        {"model_type": "opt", "word_embed_proj_dim": 128, "ffn_dim": 512},
    ],
    ids=lambda changes: changes["model_type"],
)
def test_other_models_are_refused(changes, tmp_path):
    """Whose linear layers are not only those of attention and of a dense FFN."""
    folder, _ = make(tmp_path / "hf", "packed")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match="bitnet is not supported"):
        convert(folder, tmp_path / "x.flash")
    shutil.rmtree(folder)


def test_there_is_nothing_to_predict(tmp_path, cli):
    """Of an activation that leaves no neuron silent, whose matrices stay whole."""
    folder, _ = make(tmp_path / "hf", "packed", "llama")
    code, _, err = cli("convert", folder, tmp_path / "x.flash")
    assert code == 0 and "always used whole" in err
    code, _, err = cli("run", tmp_path / "x.flash", "--tokens", "3", "--neurons", "predicted")
    assert code == 1 and "always used whole; use --neurons dense" in err
    code, out, _ = cli("inspect", tmp_path / "x.flash")
    assert code == 0 and "always used whole" in out and "each FFN is" in out
