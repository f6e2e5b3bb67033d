"""Finding out which neurons of each layer fire along a text, and which its predictor names."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from flashinfer import kernels
from flashinfer.calibration.coactivation import Layout, lay_out
from flashinfer.calibration.predictor_training import (
    Found,
    Inputs,
    Observations,
    on_own_text,
    window_rows,
)
from flashinfer.calibration.routing import router_of
from flashinfer.calibration.text_states import TextStates
from flashinfer.calibration.traces import miss_curve
from flashinfer.formats.arrays import Float32Array, Int64Array, UInt8Array
from flashinfer.formats.bundle.calibration import Cut, LayerCalibration
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.progress import Progress
from flashinfer.paper.feedforward import FeedForward
from flashinfer.paper.selection import Selection

PIECE_VALUES = 1 << 22  # activations that are computed at a time, where there is memory for them
LEAST_PIECE_VALUES = 1 << 19
PIECE_BYTES = 4 * 4  # of each, of what it is made of, and of those before
SHARED_PIECE = 256  # tokens that go through a shared expert together
CACHE_TOKENS = 2048  # the last of the text, on which caches of several sizes are tried

# A function that makes a layer's predictor, of (layer, its FFN, what it did with the text).
Predict = Callable[[int, FeedForward, Observations], Found]
# A function that finds a layer's Cut, of (its FFN, the FFN's inputs (N, d_model)).
FindCut = Callable[[FeedForward, Float32Array], Cut]


class Layer(NamedTuple):
    """What calibration finds of a layer.

    found   its predictor; None: where only its experts are counted
    record  what is written down of it; None: of a layer without experts in a mixture, or without
            neurons
    places  (neurons,) int64: where each neuron is to lie; None: by their numbers
    """

    found: Found | None
    record: LayerCalibration | None
    places: Int64Array | None = None


def firing(
    states: TextStates,
    predict: Predict,
    residual: bool,
    find_cut: FindCut | None,
    progress: Progress,
    others: int = 0,
    together: bool = False,
) -> Iterator[Layer]:
    """Yield what is found of each layer along a text, given as TextStates.

    residual  whether the predictors read the residual stream
    find_cut  None: the layers' neurons are silent by themselves
    progress  is told the layers done, in fractions, as "calibrate"
    others    the first so many tokens are of other texts: see Observations
    together  neurons are to lie beside those that they fire with
    """
    layers, early = states.model.layers, None
    for number, layer in enumerate(layers):
        progress("calibrate", number, len(layers))
        ffn = layer.feed_forward
        x, before = states.attend(layer, residual)
        if not ffn.neurons.config.neurons:
            early = _early(states, number + 1, residual)
            states.add(layer, np.zeros_like(x))
            yield Layer(None, None)
            continue
        cut = None if find_cut is None else find_cut(ffn, x)
        ffn.neurons.cut = cut
        asked, early = early, _early(states, number + 1, residual)
        router = router_of(ffn)
        weights = None if router is None else router.weights(x)  # (N, experts)
        y, fired = exact_feed_forward(ffn, x, weights, piece_values(states.model.plan.budget))
        states.add(layer, y)
        progress("calibrate", number + 0.3, len(layers))
        routed = None if weights is None else weights > 0
        reads = x if before is None else before
        observed = Observations(reads, fired, states.starts, others, routed=routed)
        found = predict(number, ffn, observed)
        record, places = _record(found, observed, asked, cut), None
        if together:
            layout = _layout(found, observed, ffn.store.bundles.row_bytes)
            record, places = replace(record, reads=layout.reads), layout.places
        yield Layer(found, record, places)
    progress("calibrate", len(layers), len(layers))


def _early(states: TextStates, number: int, residual: bool) -> Inputs | None:
    """What a layer's predictor would be asked one layer early, or None."""
    inputs = states.early_input(number, CACHE_TOKENS)
    if inputs is None:
        return None
    ffn, (normed, before) = states.model.layers[number].feed_forward, inputs
    router = router_of(ffn)
    routed = None if router is None else router.named(router.read_of(normed, before))
    return Inputs(np.array(before if residual else normed), routed=routed)


def _record(
    found: Found, observed: Observations, asked: Inputs | None, cut: Cut | None
) -> LayerCalibration:
    """What the bundle says of a layer; asked: what its predictor was asked one layer early."""
    means, most = window_rows(found, observed)
    if observed.others:
        found = on_own_text(found, observed)
    return LayerCalibration(
        active=found.active,
        predicted=found.predicted,
        missed=found.missed,
        rank=len(found.a),
        tried=found.tried,
        cut=cut,
        window_rows=means,
        window_rows_most=most,
        misses=miss_curve(_trace(found, observed), len(found.b)),
        guessed=0.0 if asked is None else _guessed(found, observed, asked),
    )


def piece_values(budget: int) -> int:
    """How many activations are computed at a time by a process that may hold so many bytes."""
    return max(LEAST_PIECE_VALUES, min(PIECE_VALUES, budget // 16 // PIECE_BYTES))


def exact_feed_forward(
    ffn: FeedForward,
    x: Float32Array,
    weights: Float32Array | None,
    piece: int = PIECE_VALUES,
) -> tuple[Float32Array, UInt8Array]:
    """The exact FFN over x (N, d_model) -> ((N, d_model), Observations.fired).

    weights  (N, experts): what each of a mixture's experts counts, or None
    piece    activations that are computed at a time
    """
    y = np.zeros_like(x)
    if ffn.shared is not None:
        for first in range(0, len(x), SHARED_PIECE):
            y[first : first + SHARED_PIECE] = ffn.shared(x[first : first + SHARED_PIECE])
    packed = np.zeros((ffn.store.bundles.rows, -(-len(x) // 8)), dtype=np.uint8)
    neurons = ffn.neurons
    neurons.begin(len(x))
    scales = neurons.rounded_down.scales if neurons.rounded_down is not None else None
    norm = neurons.norm if scales is None else None
    if scales is not None:  # all of them once before, for what they are rounded with
        for begin, end, *_, a in _activations(ffn, x, weights, piece):
            scales.take(a, np.arange(begin, end))
    for begin, end, tile, rows, tokens, share, a in _activations(ffn, x, weights, piece):
        if scales is not None:
            a = scales.round(scales.weigh(a, np.arange(begin, end)))
        fired, its_y = np.zeros((len(rows), len(x)), dtype=bool), y[tokens]
        fired[:, tokens] = a != 0
        packed[begin:end] = np.packbits(fired, axis=1)
        if share is not None:
            a *= share
        if norm is not None:
            a = norm.take(a, np.arange(begin, end))
        kernels.sparse_down(tile, rows + neurons.down_at, neurons.format, a, its_y)
        y[tokens] = its_y
    if norm is not None:
        norm.divide(y)
    bias = neurons.biases["down"]
    return y if bias is None else y + bias, packed


class _Activations(NamedTuple):
    """Those of the neurons begin:end, a (n, its tokens), whose bundles begin at ``rows`` of a tile;
    share: what their expert counts for each of these tokens, or None."""

    begin: int
    end: int
    tile: UInt8Array
    rows: Int64Array
    tokens: slice | Int64Array
    share: Float32Array | None
    a: Float32Array


def _activations(
    ffn: FeedForward, x: Float32Array, weights: Float32Array | None, piece: int
) -> Iterator[_Activations]:
    """Yield what all neurons give for x (N, d_model); the others as in ``exact_feed_forward``."""
    for first, stop, tile, starts in ffn.store.tiles():
        for begin, end, expert in _parts(ffn, first, stop, max(1, piece // len(x))):
            rows, share = starts[begin - first : end - first], None
            tokens: slice | Int64Array = slice(None)
            if weights is not None:
                tokens = np.flatnonzero(weights[:, expert] > 0)
                share = weights[tokens, expert]
            a = ffn.neurons.activations(tile, rows, x[tokens], np.arange(begin, end))
            yield _Activations(begin, end, tile, rows, tokens, share, a)


def _parts(ffn: FeedForward, first: int, stop: int, step: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, expert) through the neurons first:stop, at most ``step`` of one expert
    each."""
    each = ffn.neurons.config.d_ffn
    each = each if ffn.neurons.config.router else stop
    while first < stop:
        expert = first // each
        end = min(first + step, stop, (expert + 1) * each)
        yield first, end, expert
        first = end


def _trace(found: Found, observed: Observations) -> Iterator[Selection]:
    """Yield the Selection of each of the text's last tokens."""
    begin = max(observed.others, len(observed.x) - CACHE_TOKENS)
    for first in range(begin, len(observed.x), 256):
        for says in found.says(observed, slice(first, first + 256)).T:
            yield Selection.of_scores(says[None])


def path_bytes(config: ModelConfig) -> int:
    """Bytes that finding a layer's layout takes: which tokens use each neuron, and copies of it on
    the way along the path."""
    return 5 * CACHE_TOKENS // 8 * max(layer.ffn.neurons for layer in config.layers)


def _layout(found: Found, observed: Observations, row_bytes: int) -> Layout:
    """Where a layer's neurons are to lie, by what its predictor names along the text's end."""
    end = len(observed.x)
    begin = max(observed.others, end - CACHE_TOKENS)
    says = [
        np.packbits(found.says(observed, slice(first, min(first + 256, end))), axis=1)
        for first in range(begin, end, 256)
    ]  # whole bytes of each 256 tokens
    return lay_out(np.concatenate(says, axis=1), end - begin, row_bytes)


def _guessed(found: Found, observed: Observations, early: Inputs) -> float:
    """The share of the neurons predicted that the predictor named one layer early."""
    begin, right, used = len(observed.x) - len(early.x), 0, 0
    for first in range(0, len(early.x), 256):
        uses = found.says(observed, slice(begin + first, begin + first + 256))
        used += np.count_nonzero(uses)
        right += np.count_nonzero(uses & found.says(early, slice(first, first + 256)))
    return right / max(1, used)
