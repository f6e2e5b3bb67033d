"""Models whose linear layers round what they read to 8 bits (BitNet b1.58)."""

import itertools

import numpy as np
import pytest
from ternary_checkpoints import FORMS, make

from conftest import logits_of
from flashinfer import BudgetError, Model
from flashinfer.formats.convert import convert
from flashinfer.oracle.arithmetic import KNOWN
from flashinfer.oracle.compare import compare
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.oracle.trace import trace
from flashinfer.oracle.trace_file import Trace

TEXTS = np.random.default_rng(8).integers(3, 96, (40, 5))
IDS = np.random.default_rng(4).integers(3, 96, 40)


@pytest.mark.parametrize("dtype", [None, "f16", "q8_0"])
@pytest.mark.parametrize("kind", ["bitnet", "llama"])
def test_no_way_to_run_a_layer_changes_a_bit(kind, dtype, twin, tmp_path):
    """All in DRAM and streamed; a prompt at once, and token by token; by several threads."""
    folder, _ = make(tmp_path / "hf", "packed", kind)
    path = tmp_path / "x.flash"
    convert(folder, path, dtype)
    whole, single = logits_of(path, IDS)
    found = [*logits_of(path, IDS, threads=3)]
    with pytest.raises(BudgetError) as caught:
        Model.open(path, memory=1)
    for threads, extra in itertools.product((1, 3), (0, 300_000)):
        found += logits_of(path, IDS, memory=caught.value.least + extra, threads=threads)
    assert np.isfinite(whole).all() and np.array_equal(single, whole)
    assert all(np.array_equal(logits, whole) for logits in found)


@pytest.mark.parametrize("kind", ["bitnet", "llama"])
@pytest.mark.parametrize("form", FORMS)
def test_the_oracle_finds_the_same(form, kind, tmp_path):
    """In float64, of the checkpoint's own weights, and of the ternary bundle's."""
    folder, _ = make(tmp_path / "hf", form, kind)
    for dtype in ("f32", None):
        path, found = tmp_path / f"{dtype}.flash", tmp_path / f"{dtype}.safetensors"
        convert(folder, path, dtype)
        with Model.open(path, context=len(IDS), kv_dtype="f32") as model:
            trace(model, IDS, found)
        with ModelWeights(folder if dtype else path) as weights, Trace(found) as values:
            for replay in (True, False):
                comparison = compare(weights, values, KNOWN["float32"], replay)
                assert comparison.first is None
                assert comparison.judged > 10 * weights.config.num_hidden_layers


def test_rounding_is_seen_by_the_oracle(tmp_path):
    """The same weights without rounding are another model."""
    folder, _ = make(tmp_path / "hf", "packed")
    path, found = tmp_path / "x.flash", tmp_path / "t.safetensors"
    convert(folder, path, "f32")
    with Model.open(path, context=len(IDS), kv_dtype="f32") as model:
        for layer in model.layers:
            for linear in layer.mixer.linears:
                linear.rounded = False
        trace(model, IDS, found)
    with ModelWeights(folder) as weights, Trace(found) as values:
        first = compare(weights, values, KNOWN["float32"]).first
        assert first is not None and "_proj" in first.name


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its own modules
@pytest.mark.parametrize("kind, biases", [("bitnet", False), ("llama", False), ("llama", True)])
@pytest.mark.parametrize("form", FORMS)
def test_against_transformers(form, kind, biases, tmp_path):
    """A value near the middle of two whole numbers may be rounded either way, which moves the
    logits of its token and of those behind it: so texts are short, and those of most agree."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    folder, _ = make(tmp_path / "hf", form, kind, biases=biases)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = model(torch.from_numpy(TEXTS)).logits.numpy()
    convert(folder, tmp_path / "x.flash", "f32")
    found = []
    with Model.open(tmp_path / "x.flash", context=len(IDS), kv_dtype="f32") as ours:
        for text in TEXTS:
            ours.reset()
            found.append(ours.logits(text))
    off = np.abs(np.stack(found) - theirs).max(axis=(1, 2))
    assert np.median(off) < 1e-4
    assert off.max() < 0.1 * np.abs(theirs).max()
