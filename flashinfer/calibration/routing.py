"""Finding out which experts of a mixture a text uses, for the plan, the cache and a warm start."""

from collections.abc import Iterator

from flashinfer.calibration.text_states import TextStates
from flashinfer.calibration.traces import largest, routing_record
from flashinfer.formats.bundle.calibration import LayerCalibration
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.progress import Progress
from flashinfer.paper.feedforward import FeedForward
from flashinfer.paper.router import Router


def tokens_that_fit(config: ModelConfig, budget: int) -> int:
    """Tokens whose states and choices fit a third of the budget."""
    return max(0, budget // 3 // (6 * config.hidden_size * 4 + 9 * config.experts))


def router_of(ffn: FeedForward) -> Router:
    """The router of a mixture's layer whose units are whole experts."""
    assert isinstance(ffn.predictor, Router)
    return ffn.predictor


def routing(states: TextStates, progress: Progress) -> Iterator[LayerCalibration]:
    """Yield the LayerCalibration of each layer along a text, given as TextStates."""
    layers, early = states.model.layers, None
    for number, layer in enumerate(layers):
        progress("calibrate", number, len(layers))
        x, residual = states.attend(layer)
        router = router_of(layer.feed_forward)
        uses = largest(router.scores(x), router.per_token)
        record = routing_record(uses, early)
        following = states.early_input(number + 1)
        if following is not None:
            early = router_of(layers[number + 1].feed_forward).scores(following[0])
        states.add(layer, layer.feed_forward(x, 0, residual))
        yield record
    progress("calibrate", len(layers), len(layers))
