"""Finding out which experts of a mixture a text uses, for the plan, the cache and a warm start."""

from collections.abc import Iterator

import numpy as np

from flashinfer.calibration.text_states import TextStates, state_numbers
from flashinfer.calibration.traces import routing_record
from flashinfer.formats.arrays import BoolArray, Float32Array
from flashinfer.formats.bundle.calibration import LayerCalibration
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.progress import Progress
from flashinfer.paper.feedforward import FeedForward
from flashinfer.paper.neurons import working_bytes
from flashinfer.paper.router import SURE, Router
from flashinfer.paper.selection import Tokens

LEAST_PIECE = 64  # tokens; each piece may read all of a layer's experts again


def tokens_that_fit(config: ModelConfig, budget: int) -> int:
    """Tokens whose states and choices fit a quarter of the budget."""
    experts = max(layer.ffn.experts for layer in config.layers)
    return max(0, budget // 4 // (4 * state_numbers(config) + 13 * experts))


def router_of(ffn: FeedForward) -> Router | None:
    """The router of a layer whose units are whole experts; None: it has no experts."""
    return ffn.predictor if isinstance(ffn.predictor, Router) else None


def in_pieces(
    ffn: FeedForward,
    x: Float32Array,
    residual: Float32Array | None,
    before: Float32Array | None,
    budget: int,
) -> Float32Array:
    """A layer's FFN over x (N, d_model), of so many tokens at a time that their activations take a
    twelfth of the budget -> (N, d_model).

    residual, before  (N, d_model): see ``TextStates.attend`` and its ``before``
    """
    n = max(LEAST_PIECE, budget // 12 // working_bytes(ffn.neurons.config))
    y = np.empty_like(x)
    for first in range(0, len(x), n):
        piece = slice(first, first + n)
        tokens = Tokens(0, len(x[piece]))
        if before is not None:
            ffn.choose_early(before[piece], tokens)
        y[piece] = ffn(x[piece], tokens, None if residual is None else residual[piece])
    return y


def routing(
    states: TextStates, progress: Progress, budget: int
) -> Iterator[LayerCalibration | None]:
    """Yield the LayerCalibration of each layer along a text, given as TextStates; None of a layer
    without experts.

    budget  bytes, of which ``tokens_that_fit`` and ``in_pieces`` take a third
    """
    layers = states.model.layers
    named: list[BoolArray] = []  # by the router, asked one layer early
    for number, layer in enumerate(layers):
        progress("calibrate", number, len(layers))
        x, residual = states.attend(layer)
        router, record = router_of(layer.feed_forward), None
        if router:
            before = residual if states.before is None else states.before
            read = router.read_of(x, before)
            record = routing_record(router.named(read), router.weights(read), *named)
        following, named = states.early_input(number + 1), []
        router = None if following is None else router_of(layers[number + 1].feed_forward)
        if following is not None and router is not None:
            named = [router.named(router.read_of(*following), share) for share in (1.0, SURE)]
        states.add(layer, in_pieces(layer.feed_forward, x, residual, states.before, budget))
        yield record
    progress("calibrate", len(layers), len(layers))
