"""Finding out which experts of a mixture a text uses, for the plan, the cache and a warm start."""

from collections.abc import Iterator

from flashinfer.calibration.text_states import TextStates
from flashinfer.calibration.traces import routing_record
from flashinfer.formats.arrays import BoolArray
from flashinfer.formats.bundle.calibration import LayerCalibration
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.progress import Progress
from flashinfer.paper.feedforward import FeedForward
from flashinfer.paper.router import SURE, Router


def tokens_that_fit(config: ModelConfig, budget: int) -> int:
    """Tokens whose states and choices fit a third of the budget."""
    experts = max(layer.ffn.experts for layer in config.layers)
    return max(0, budget // 3 // (6 * config.hidden_size * 4 + 9 * experts))


def router_of(ffn: FeedForward) -> Router | None:
    """The router of a layer whose units are whole experts; None: it has no experts."""
    return ffn.predictor if isinstance(ffn.predictor, Router) else None


def routing(states: TextStates, progress: Progress) -> Iterator[LayerCalibration | None]:
    """Yield the LayerCalibration of each layer along a text, given as TextStates; None of a layer
    without experts."""
    layers = states.model.layers
    named: list[BoolArray] = []  # by the router, asked one layer early
    for number, layer in enumerate(layers):
        progress("calibrate", number, len(layers))
        x, residual = states.attend(layer)
        router, record = router_of(layer.feed_forward), None
        if router:
            record = routing_record(router.named(x), *named)
        following, named = states.early_input(number + 1), []
        if following and (router := router_of(layers[number + 1].feed_forward)):
            named = [router.named(following[0], share) for share in (1.0, SURE)]
        states.add(layer, layer.feed_forward(x, 0, residual))
        yield record
    progress("calibrate", len(layers), len(layers))
