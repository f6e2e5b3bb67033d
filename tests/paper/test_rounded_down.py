"""A down projection of activations that are rounded together, of which a layer has parts."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ternary_checkpoints import make

from conftest import logits_of
from flashinfer import BudgetError, Model
from flashinfer.calibration.calibrate import calibrate
from flashinfer.calibration.firing import exact_feed_forward
from flashinfer.formats.convert import convert
from flashinfer.formats.layers.ffn import FFNConfig
from flashinfer.formats.layers.norm import NormConfig
from flashinfer.formats.number_formats import FORMATS
from flashinfer.kernels.sparse_matmul import round_tokens
from flashinfer.paper.activations_norm import ActivationsNorm
from flashinfer.paper.rounded_down import RoundedDown, TokenScales
from flashinfer.paper.selection import Selection, Tokens
from flashinfer.study.ideal import predict_ideally, watch

IDS = np.random.default_rng(4).integers(3, 96, 40)
EPSILON = 1e-3


def activations(random, neurons, n_tokens):
    """(neurons, T), some half of them silent, and of very different sizes; a token of zeros."""
    a = np.maximum(random.standard_normal((neurons, n_tokens)), 0) ** 3
    a *= random.lognormal(0, 2, (neurons, 1))
    a[:, -1] *= n_tokens == 1
    return a.astype(np.float32)


def down_of(a, cuts, weight, passing, of_pairs, rows):
    """(T, columns): the down projection of ``a`` (neurons, T), which comes in parts."""
    (neurons, n_tokens), (_, columns) = a.shape, rows.shape
    config = FFNConfig(hidden_size=columns, d_ffn=neurons, activation="relu2", rounded=True)
    memory, width = rows.view(np.uint8).reshape(-1), 4 * columns
    norm = None if weight is None else ActivationsNorm(NormConfig("rms", EPSILON), weight, neurons)
    room = np.empty(memory.size, dtype=np.uint8)
    down = RoundedDown(config, FORMATS["f32"], TokenScales(norm), room)
    used = Selection.everything(neurons, n_tokens)
    if of_pairs:
        used = Selection.of_scores(a.T)
    y = np.zeros((n_tokens, columns), dtype=np.float32)
    for _ in range(2):  # the second time with what the first has left
        y[:] = 0
        down.begin(n_tokens)
        for first, stop in itertools.pairwise([0, *cuts, len(used.units)]):
            part = used.part(first, stop)
            its = a[part.units]
            if part.indptr is not None:
                its = a[np.repeat(part.units, np.diff(part.indptr)), part.tokens]
            at = part.units.astype(np.int64) * width
            where = memory.copy() if passing else memory
            down.take(where, at, its, part, passing)
            if passing:
                where[:] = 255
        down.add(y)
    return y


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 5), st.booleans(),
       st.booleans(), st.booleans())  # fmt: skip
def test_parts_give_the_bits_of_all_together(seed, neurons, n_tokens, weighted, passing, of_pairs):
    """And those are what ``round_tokens`` gives of all of a token's activations."""
    random = np.random.default_rng(seed)
    a = activations(random, neurons, n_tokens)
    weight = random.standard_normal(neurons).astype(np.float32) if weighted else None
    rows = random.standard_normal((neurons, 3)).astype(np.float32)
    of_pairs = of_pairs and n_tokens > 1
    whole = down_of(a, (), weight, False, False, rows)
    n = len(Selection.of_scores(a.T).units) if of_pairs else neurons
    cuts = sorted(random.integers(0, n + 1, random.integers(0, 5)).tolist())
    assert np.array_equal(down_of(a, cuts, weight, passing, of_pairs, rows), whole)
    exact = a.T.astype(np.float64)
    if weighted:
        exact = exact * weight / np.sqrt((exact**2).mean(axis=1, keepdims=True) + EPSILON)
    scales, q = round_tokens(exact.astype(np.float32))
    # A value near the middle of two whole numbers may have become either.
    off = np.abs(whole - (q * scales.astype(np.float64)) @ rows)
    near = np.abs(np.abs(exact / scales) % 1 - 0.5) < 1e-4
    assert (off <= 1e-5 * np.abs(whole).max() + scales * (near @ np.abs(rows))).all()


@pytest.fixture(scope="module", params=[("packed", "bitnet"), ("online", "llama")], ids=" ".join)
def bitnet(request, tmp_path_factory):
    """A ternary model with predictors, which miss some neurons: with a norm of all activations, and
    without."""
    folder = tmp_path_factory.mktemp("bitnet")
    checkpoint, _ = make(folder / "hf", *request.param, activation="relu2")
    convert(checkpoint, folder / "x.flash")
    ids = np.random.default_rng(5).integers(3, 96, 48 * 12)
    calibrate(folder / "x.flash", ids, folder / "y.flash", tokens=len(ids), steps=20)
    return folder / "y.flash"


@pytest.mark.parametrize("mode", ["dense", "predicted"])
def test_no_way_to_run_a_layer_changes_a_bit(bitnet, mode, twin, constant_rss):
    """Whole, cached, in waves and streamed; a prompt at once, and token by token."""
    whole, single = logits_of(bitnet, IDS, neurons=mode)
    found = [*logits_of(bitnet, IDS, neurons=mode, threads=3)]
    for rows, window in itertools.product((1, 33, 300, 512), (None, 2)):
        found += logits_of(bitnet, IDS, rows, neurons=mode, window=window)
    with pytest.raises(BudgetError) as caught:
        Model.open(bitnet, memory=1, neurons=mode)
    found += logits_of(bitnet, IDS, neurons=mode, memory=caught.value.least)
    assert np.array_equal(single, whole)
    assert all(np.array_equal(logits, whole) for logits in found)


def test_the_neurons_that_fire_are_all_that_count(bitnet):
    """Those whose activations are rounded to 0 do not fire; a norm, though, counts them."""
    with Model.open(bitnet, neurons="dense") as model:
        dense = model.logits(IDS[:5])
        normed = model.config.layers[0].ffn.activations_norm is not None
    with Model.open(bitnet, neurons="predicted") as model:
        predicted = model.logits(IDS[:5])
        model.reset()
        predict_ideally(model)
        ideal = model.logits(IDS[:5])
        model.reset()
        assert np.array_equal(np.stack([model.forward([token]) for token in IDS[:5]]), ideal)
    off, size = np.abs(ideal - dense).max(), np.abs(dense).max()
    assert 0 < off < 0.05 * size if normed else off == 0
    assert np.abs(predicted - dense).max() > off


def test_calibration_computes_the_same_layer(bitnet):
    """And finds fire what rounding leaves, by the definition."""
    with Model.open(bitnet, neurons="dense") as model:
        ffn, d = model.layers[1].feed_forward, model.config.hidden_size
        x = np.random.default_rng(6).standard_normal((13, d)).astype(np.float32)
        exact, fired = exact_feed_forward(ffn, x, None)
        y = ffn(x, Tokens(0, 13))
        assert np.abs(exact - y).max() < 1e-5 * np.abs(y).max()
        gates, ups, _ = model.bundle.read("layers.1.ffn.bundles").reshape(512, 3, d).swapaxes(0, 1)
        weight = np.ones(512)
        if ffn.neurons.norm is not None:
            weight = model.bundle.read("layers.1.activations_norm.weight").reshape(-1)
    scales, q = round_tokens(x)
    gate, up = ((q * scales.astype(np.float64)) @ part.T for part in (gates, ups))
    a = (np.maximum(gate, 0) ** 2 * up * weight).astype(np.float32)
    fires = np.abs(a) > np.abs(a).max(axis=1, keepdims=True) / 254
    found = np.unpackbits(fired, axis=1, count=13).T.astype(bool)
    assert np.mean(found != fires) < 0.002 and 0 < found.mean() < (a != 0).mean()


def test_what_a_run_misses_is_what_calibration_expects(bitnet):
    ids = np.random.default_rng(5).integers(3, 96, 48 * 8)
    with Model.open(bitnet, neurons="predicted") as model:
        expected = model.bundle.calibration.layers[0]
        counts = watch(model)[0]
        for start in range(0, len(ids), 48):
            model.reset()
            model.logits(ids[start : start + 48])
    n = counts.tokens * 512
    assert counts.fired / n == pytest.approx(expected.active, rel=0.1)
    assert counts.named / n == pytest.approx(expected.predicted, rel=0.1)
