"""What a perfect predictor would name, and how far the real one is from it."""

import numpy as np

from flashinfer.assembly import chain_streams
from flashinfer.formats.arrays import BoolArray, Float32Array, Int32Array
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.model import Model
from flashinfer.paper.feedforward import FeedForward
from flashinfer.paper.interfaces import Chooser, Stream, Tap
from flashinfer.paper.router import RoutedPredictor
from flashinfer.paper.selection import Selection


class Firing:
    """Finds which neurons of a layer fire, by computing all of them: a Stream of the layer. Those
    fire of which the down projection reads something else than 0.

    router  of a mixture, of whose neurons only those of a token's experts can fire; None: there is
            none
    each    neurons of an expert
    """

    def __init__(self, ffn: FeedForward) -> None:
        self.neurons, self.store = ffn.neurons, ffn.store
        self.tensor = ffn.store.bundles
        self.following: StoredTensor | None = None
        self.router = ffn.predictor.router if isinstance(ffn.predictor, RoutedPredictor) else None
        self.each = self.neurons.config.d_ffn

    def __call__(self, x: Float32Array) -> tuple[BoolArray, Float32Array | None]:
        """The FFN's input x (T, d_model) -> (which neurons fire (T, neurons), the weight of each
        expert (T, experts), 0 where it is not chosen, or None where there are none)."""
        fired = np.zeros((len(x), self.tensor.rows), dtype=bool)
        down, waiting = self.neurons.rounded_down, list[tuple[int, Float32Array]]()
        self.neurons.begin(len(x))
        for first, stop, memory, starts in self.store.flash.stream(
            self.tensor, self.store.buffer, self.following
        ):
            a = self.neurons.activations(memory, starts, x, np.arange(first, stop))  # (n, T)
            fired[:, first:stop] = a.T != 0
            if down is not None:
                waiting.append((first, down.scales.take(a, np.arange(first, stop))))
        if down is not None:
            for first, a in waiting:
                fired[:, first : first + len(a)] = down.scales.round(a).T != 0
        self.neurons.begin(len(x))  # the layer's own turn comes only now
        if self.router is None:
            return fired, None
        weights = self.router.weights(x)
        return fired & np.repeat(weights > 0, self.each, axis=1), weights


class Ideal:
    """A Chooser that names exactly the neurons that fire."""

    in_dram = False  # asking it reads the whole layer

    def __init__(self, ffn: FeedForward) -> None:
        self.firing = Firing(ffn)

    def select(self, x: Float32Array, residual: Float32Array | None) -> Selection:
        """The Selection of the neurons that fire, each with its expert's weight."""
        fired, weights = self.firing(x)
        selection = Selection.of_scores(fired.astype(np.float32))
        if weights is None:
            return selection
        experts, tokens = selection.units // self.firing.each, selection.tokens
        if selection.indptr is not None:
            experts = np.repeat(experts, np.diff(selection.indptr))
        selection.weights = weights[0 if tokens is None else tokens, experts]
        return selection

    def early(
        self, x: Float32Array, residual: Float32Array | None, share: float = 1.0
    ) -> tuple[Int32Array, Int32Array]:
        """Names nothing early."""
        nothing = np.empty(0, dtype=np.int32)
        return nothing, nothing

    def streams(self) -> tuple[Stream, ...]:
        """What is streamed at every token: the layer."""
        return (self.firing,)

    def set_tap(self, tap: Tap | None) -> None:
        """Has nothing to tell."""


class Watched:
    """A Chooser that names what ``predictor`` names, and counts its errors.

    tokens, fired, named, missed, needless  sums over the tokens: of neurons that fire, that are
    named, that fire and are not named, and that are named and do not fire
    """

    in_dram = False

    def __init__(self, ffn: FeedForward, predictor: Chooser) -> None:
        self.predictor, self.firing = predictor, Firing(ffn)
        self.tokens = self.fired = self.named = self.missed = self.needless = 0

    def select(self, x: Float32Array, residual: Float32Array | None) -> Selection:
        """The Selection that ``predictor`` gives."""
        selection = self.predictor.select(x, residual)
        fired, _ = self.firing(x)
        named = np.zeros_like(fired)
        if selection.indptr is None:
            named[:, selection.units] = True
        else:
            named[selection.tokens, np.repeat(selection.units, np.diff(selection.indptr))] = True
        self.tokens += len(x)
        self.fired += int(np.count_nonzero(fired))
        self.named += int(np.count_nonzero(named))
        self.missed += int(np.count_nonzero(fired & ~named))
        self.needless += int(np.count_nonzero(named & ~fired))
        return selection

    def early(
        self, x: Float32Array, residual: Float32Array | None, share: float = 1.0
    ) -> tuple[Int32Array, Int32Array]:
        """What ``predictor`` names early."""
        return self.predictor.early(x, residual, share)

    def streams(self) -> tuple[Stream, ...]:
        """What is streamed at every token: what ``predictor`` streams, then the layer."""
        return (*self.predictor.streams(), self.firing)

    def set_tap(self, tap: Tap | None) -> None:
        """Pass it on."""
        self.predictor.set_tap(tap)


def predict_ideally(model: Model) -> None:
    """Let each layer of a model in predicted mode use exactly the neurons that fire."""
    for layer in model.layers:
        layer.feed_forward.predictor = Ideal(layer.feed_forward)
    chain_streams(model.layers, model.decoder.head)


def watch(model: Model) -> list[Watched]:
    """Count the errors of each layer's predictor from now on, of a model in predicted mode."""
    watched = []
    for layer in model.layers:
        ffn = layer.feed_forward
        assert ffn.predictor is not None  # in predicted mode each layer has one
        ffn.predictor = counting = Watched(ffn, ffn.predictor)
        watched.append(counting)
    chain_streams(model.layers, model.decoder.head)
    return watched
