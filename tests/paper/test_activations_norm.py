"""A norm of all activations of a token, of which a layer that is read sparsely has parts."""

import itertools

import numpy as np
import pytest

from conftest import DATA, logits_of
from flashinfer import BudgetError, Model
from flashinfer.calibration.calibrate import calibrate
from flashinfer.calibration.firing import exact_feed_forward
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError
from flashinfer.formats.layers.ffn import FFNConfig, RouterConfig
from flashinfer.formats.layers.norm import NormConfig
from flashinfer.formats.number_formats import FORMATS, Matrices
from flashinfer.paper.activations_norm import ActivationsNorm
from flashinfer.paper.selection import Selection, Tokens
from flashinfer.paper.whole_units import WholeUnits

NEURONS, EPSILON = 3000, 1e-3
RANDOM = np.random.default_rng(3)
WEIGHT = RANDOM.standard_normal(NEURONS).astype(np.float32)


def norm_of(weight=WEIGHT):
    return ActivationsNorm(NormConfig("rms", EPSILON), weight, NEURONS)


def activations(n_tokens):
    """(neurons, T), some half of them silent, and of very different sizes."""
    a = np.maximum(RANDOM.standard_normal((NEURONS, n_tokens)), 0) ** 3
    return (a * RANDOM.lognormal(0, 2, (NEURONS, 1))).astype(np.float32)


@pytest.mark.parametrize("n_tokens", [1, 2, 17])
@pytest.mark.parametrize("weight", [WEIGHT, None], ids=["weights", "no weights"])
def test_parts_give_the_bits_of_all_together(n_tokens, weight):
    a, norm = activations(n_tokens), norm_of(weight)
    norm.begin(n_tokens)
    whole = norm.take(a.copy(), np.arange(NEURONS))
    squares, y = norm.squares.copy(), np.ones((n_tokens, 2), dtype=np.float32)
    norm.divide(y)
    exact = np.sqrt((a.astype(np.float64) ** 2).mean(axis=0) + EPSILON)
    assert np.allclose(y, 1 / exact[:, None], rtol=1e-6)
    assert np.array_equal(whole, a if weight is None else a * weight[:, None])
    for cuts in ([1], [7, 8, 500], sorted(RANDOM.integers(0, NEURONS, 40))):
        norm.begin(n_tokens)
        ends = [0, *cuts, NEURONS]
        parts = [
            norm.take(a[i:j].copy(), np.arange(NEURONS)[i:j]) for i, j in itertools.pairwise(ends)
        ]
        assert np.array_equal(np.concatenate(parts), whole)
        assert np.array_equal(norm.squares, squares)


def test_neurons_of_each_token_alone_give_the_same_bits():
    a, norm = activations(9), norm_of()
    norm.begin(9)
    whole = norm.take(a.copy(), np.arange(NEURONS))
    squares = norm.squares.copy()
    used = Selection.of_scores(a.T)
    norm.begin(9)
    for first, stop in ((0, 100), (100, 101), (101, NEURONS)):
        part = used.part(first, stop)
        of_pairs = a[np.repeat(part.units, np.diff(part.indptr)), part.tokens]
        found = norm.take(of_pairs, part.units, part.indptr, part.tokens)
        expected = whole[np.repeat(part.units, np.diff(part.indptr)), part.tokens]
        assert np.array_equal(found, expected)
    assert np.array_equal(norm.squares, squares)


@pytest.fixture(scope="module")
def bitnet(tmp_path_factory):
    """BitNet with predictors, which miss some neurons."""
    folder = tmp_path_factory.mktemp("bitnet")
    convert(DATA / "bitnet", folder / "x.flash", "f32")
    ids = np.random.default_rng(5).integers(3, 96, 48 * 12)
    calibrate(folder / "x.flash", ids, folder / "y.flash", tokens=len(ids), steps=20)
    return folder / "y.flash"


@pytest.mark.parametrize("mode", ["dense", "predicted"])
def test_no_way_to_run_a_layer_changes_a_bit(bitnet, mode, twin, constant_rss):
    """Whole, cached, in waves and streamed; a prompt at once, and token by token."""
    ids = np.random.default_rng(4).integers(3, 96, 40)
    whole, single = logits_of(bitnet, ids, neurons=mode)
    found = [*logits_of(bitnet, ids, neurons=mode, threads=3)]
    for rows, window in itertools.product((1, 5, 33, 72), (None, 2)):
        found += logits_of(bitnet, ids, rows, neurons=mode, window=window)
    with pytest.raises(BudgetError) as caught:
        Model.open(bitnet, memory=1, neurons=mode)
    found += logits_of(bitnet, ids, neurons=mode, memory=caught.value.least)
    assert np.array_equal(single, whole)
    assert all(np.array_equal(logits, whole) for logits in found)


def test_calibration_computes_the_same_layer(bitnet):
    with Model.open(bitnet, neurons="dense") as model:
        ffn = model.layers[1].feed_forward
        x = RANDOM.standard_normal((7, model.config.hidden_size)).astype(np.float32)
        exact, _ = exact_feed_forward(ffn, x, None)
        assert np.allclose(exact, ffn(x, Tokens(0, 7)), rtol=1e-5, atol=1e-6)


def test_matrices_that_are_used_whole(twin):
    """The same FFN, whose matrices lie one behind the other, against float64."""
    d, n = 24, 40
    config = FFNConfig(
        hidden_size=d, d_ffn=n, activation="silu", matrices=True,
        activations_norm=NormConfig("rms", EPSILON),
    )  # fmt: skip
    format = Matrices(config.matrix_shapes(), [FORMATS["f32"]] * 3)
    parts = {
        name: RANDOM.standard_normal(shape).astype(np.float32)
        for name, shape in config.matrix_shapes().items()
    }
    memory = np.concatenate([matrix.reshape(-1) for matrix in parts.values()]).view(np.uint8)
    weight, x = WEIGHT[:n], RANDOM.standard_normal((5, d)).astype(np.float32)
    norm = ActivationsNorm(config.activations_norm, weight, n)
    units = WholeUnits(config, format, dict.fromkeys(("gate", "up", "down")), norm)
    y, every = np.zeros((5, d), dtype=np.float32), Selection.everything(1, 5)
    units.begin(5)
    starts = np.array([[part.at for part in format.parts.values()]])
    units.add(memory, starts, x, every, y)
    units.finish(every, y)
    gate, up = (x.astype(np.float64) @ parts[name].T for name in ("gate", "up"))
    a = gate / (1 + np.exp(-gate)) * up
    a = a / np.sqrt((a**2).mean(axis=1, keepdims=True) + EPSILON) * weight
    assert np.allclose(y, a @ parts["down"].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"activations_norm": NormConfig("layer")},
        {"router": RouterConfig(experts=4, experts_per_token=2)},
        {"shared_d_ffn": 8},
    ],
)
def test_what_is_not_implemented_is_refused(options):
    sizes = {"hidden_size": 8, "d_ffn": 16, "activations_norm": NormConfig("rms")}
    FFNConfig(**sizes)
    with pytest.raises(FormatError, match="activations are normalised here"):
        FFNConfig(**{**sizes, **options})
