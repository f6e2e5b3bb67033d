"""Gemma 3n as GGUF, of which llama.cpp takes some sizes as given."""

import numpy as np
import pytest

from conftest import logits_of
from flashinfer import Model
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError
from flashinfer.formats.sources import names
from flashinfer.oracle.kits import gguf_form
from flashinfer.oracle.kits.configs import FAR, NEAR, WIDE, KitModel, gemma3n
from flashinfer.oracle.kits.gguf_form import gguf_of
from flashinfer.oracle.kits.hugging_face_form import write_hugging_face

# 20 layers have keys, of 10 few neurons count, and widths are those that llama.cpp knows.
KINDS = [*[NEAR, NEAR, NEAR, NEAR, FAR] * 4, NEAR, FAR]
MODEL = KitModel("gguf-gemma3n", gemma3n(
    KINDS, **WIDE, hidden_size_per_layer_input=256, laurel_rank=64, num_kv_shared_layers=2,
    vocab_size_per_layer_input=96, final_logit_softcapping=30.0,
), gguf=("f32",))  # fmt: skip
IDS = np.random.default_rng(2).integers(3, 96, 20)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma3n") / "x.gguf"
    path.write_bytes(gguf_of(MODEL, "f32"))
    return path


def test_the_checkpoint_gives_the_same_bits(gguf, tmp_path):
    write_hugging_face(MODEL, tmp_path)
    convert(tmp_path, tmp_path / "a.flash", "f32")
    convert(gguf, tmp_path / "b.flash")
    ours, theirs = (logits_of(tmp_path / name, IDS)[0] for name in ("a.flash", "b.flash"))
    assert np.isfinite(ours).all() and np.array_equal(ours, theirs)


@pytest.mark.parametrize("format", ["f16", "q8_0", "q4_0"])
def test_it_keeps_its_number_formats_and_runs_where_it_lies(format, tmp_path, monkeypatch):
    monkeypatch.setattr(names, "WORTH_LEAVING", 0)
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_of(MODEL, format))
    convert(path, tmp_path / "whole.flash")
    expected, single = logits_of(tmp_path / "whole.flash", IDS)
    assert np.array_equal(expected, single)
    if format != "f16":  # of which neurons are read one by one
        convert(path, tmp_path / "x.gguf.flash", in_place=True)
        assert np.array_equal(logits_of(tmp_path / "x.gguf.flash", IDS)[0], expected)
    with Bundle(tmp_path / "whole.flash") as bundle:
        assert bundle.tensors["layers.3.q_proj.weight"].format.name == format
        assert bundle.tensors["embed_tokens_per_layer.weight"].format.name == format
        # llama.cpp's tools never quantise what hidden states are made by.
        assert bundle.tensors["states.out.2.weight"].format.name == "f32"


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"attention.shared_kv_layers": 3}, "shared_kv_layers"),
        ({"attention.shared_kv_layers": 0}, "shared_kv_layers"),
        ({"attention.sliding_window_pattern": [True] * 22}, "sliding_window_pattern"),
        ({"attention.value_length": 32}, "value_length"),
        ({"activation_sparsity_scale": [1.0] * 10 + [-np.inf] * 12}, "activation_sparsity_scale"),
        ({"activation_sparsity_scale": [1.6448533535] * 22}, "activation_sparsity_scale"),
        ({"activation_sparsity_scale": [np.nan] * 22}, "activation_sparsity_scale"),
        ({"activation_sparsity_scale": [1.6448533535] * 10}, "activation_sparsity_scale"),
        ({"activation_sparsity_scale": [1] * 22}, "activation_sparsity_scale"),
        ({"final_logit_softcapping": 20.0}, "final_logit_softcapping"),
        ({"altup.num_inputs": 3}, "altup"),
        ({"altup.num_inputs": 65}, "hidden state"),
        ({"altup.active_idx": 4}, "hidden state"),
        ({"feed_forward_length": [96] * 21 + [64]}, "ffn"),
        ({"embedding_length_per_layer_input": 128}, "per_layer"),
        ({"altup.other": 1}, "altup.other"),
    ],
    ids=str,
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(changes, named, tmp_path, monkeypatch):
    of = gguf_form.OF_ARCHITECTURES["gemma3n"]
    changed = {**gguf_form.OF_ARCHITECTURES, "gemma3n": lambda config: {**of(config), **changes}}
    monkeypatch.setattr(gguf_form, "OF_ARCHITECTURES", changed)
    (tmp_path / "x.gguf").write_bytes(gguf_of(MODEL, "f16"))
    with pytest.raises(FormatError, match=named) as caught:
        convert(tmp_path / "x.gguf", tmp_path / "x.flash")
    assert "\n" not in str(caught.value) and not (tmp_path / "x.flash").exists()


def with_one_neuron_less(gates, deviations):
    """What cuts gates in llama.cpp, whose variance is a sum divided by one neuron less."""
    cut = gates.mean(axis=0) + deviations * gates.std(axis=0, ddof=1)
    np.maximum(gates - cut, 0, out=gates)


def test_llama_cpp_finds_the_same(gguf, tmp_path, monkeypatch):
    """Its gelu is a table of 16 bits, and what is close to the cut falls on either side: so what
    moves grows from layer to layer, and from token to token."""
    llama = pytest.importorskip("llama_cpp")
    model = llama.Llama(
        str(gguf), n_ctx=48, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1
    )
    model.eval(IDS.tolist())
    theirs = np.array(model.scores[: len(IDS)])
    monkeypatch.setattr("flashinfer.paper.neurons.cut_gates", with_one_neuron_less)
    convert(gguf, tmp_path / "x.flash")
    with Model.open(tmp_path / "x.flash", kv_dtype="f32") as ours:
        off = np.abs(ours.logits(IDS) - theirs).max(axis=1)
    assert np.median(off[:7]) < 0.005 and off.max() < 0.1 < np.abs(theirs).max()
