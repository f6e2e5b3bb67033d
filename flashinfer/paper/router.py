"""Which experts of a mixture tokens use, and which of their neurons."""

import math
from typing import Any

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array, Int32Array
from flashinfer.paper.interfaces import Stream
from flashinfer.paper.neurons import neurons_of
from flashinfer.paper.predictor import Predictor
from flashinfer.paper.selection import Selection

SURE = 0.5  # of an early guess of experts, where only the surest are to be read


class Router:
    """A mixture of experts' own choice: for each token those of the largest weight . x.

    weight      weights.Resident (experts, d_model); bias (experts,) float32, or None
    per_token   how many are chosen
    normalised  their weights, by a softmax over all experts, are made to add up to 1
    """

    in_dram = True

    def __init__(
        self, weight: Any, bias: Float32Array | None, per_token: int, normalised: bool
    ) -> None:
        self.weight, self.bias = weight, bias
        self.per_token, self.normalised = per_token, normalised

    def streams(self) -> tuple[Stream, ...]:
        """What is streamed at every token: nothing."""
        return ()

    def scores(self, x: Float32Array) -> Float32Array:
        """x (T, d_model) -> (T, experts) float32: the largest are chosen."""
        return self.weight.linear(x, self.bias)

    def select(self, x: Float32Array, residual: Float32Array | None) -> Selection:
        """x (T, d_model) -> the Selection of the experts, with their weights."""
        return Selection.of_choices(*kernels.route(self.scores(x), self.per_token, self.normalised))

    def weights(self, x: Float32Array) -> Float32Array:
        """What each expert counts for each token (T, experts) float32: 0 where it is not chosen."""
        chosen = self.select(x, None)
        weights = np.zeros((len(x), len(self.weight.matrix.data)), dtype=np.float32)
        if chosen.indptr is None:
            weights[0, chosen.units] = chosen.weights
        else:
            which = np.repeat(chosen.units, np.diff(chosen.indptr))
            weights[chosen.tokens, which] = chosen.weights
        return weights

    def early(
        self, x: Float32Array, residual: Float32Array | None, share: float = 1.0
    ) -> tuple[Int32Array, Int32Array]:
        """(experts worth reading, experts worth keeping) by x (1, d_model), which is not final
        yet: of those that it would choose the surest ``share``, as a wrong read costs megabytes;
        more than it would choose may still be chosen.
        """
        order = np.argsort(-self.scores(x)[0], kind="stable").astype(np.int32)
        surest = order[: math.ceil(self.per_token * share)]
        likely = order[: self.per_token * 3 // 2]
        return np.sort(surest), np.sort(likely)


class RoutedPredictor(Predictor):
    """Of the experts that a Router chooses, the neurons that are predicted active.

    neurons  of each expert; the others as Predictor's
    """

    def __init__(self, router: Router, neurons: int, *weights: Any, **form: Any) -> None:
        super().__init__(*weights, **form)
        self.router, self.neurons = router, neurons

    def select(self, x: Float32Array, residual: Float32Array | None) -> Selection:
        """The Selection of the neurons, each with its expert's weight."""
        chosen = self.router.select(x, residual)
        if len(x) == 1:
            neurons = neurons_of(chosen.units, self.neurons)
            fires = self.scores(x, residual, neurons)[0] > 0
            last = np.zeros(np.count_nonzero(fires), dtype=np.int32)
            weights = np.repeat(chosen.weights, self.neurons)[fires]
            return Selection(neurons[fires].astype(np.int32), None, None, last, weights)
        units, counts, tokens, weights = [], [], [], []
        for i, pairs in enumerate(chosen.pairs()):
            its, neurons = chosen.tokens[pairs], neurons_of(chosen.units[i : i + 1], self.neurons)
            fires = self.scores(x[its], residual[its], neurons).T > 0  # (neurons, its tokens)
            n = np.count_nonzero(fires, axis=1)
            which = np.nonzero(fires)[1]
            units.append(neurons[n > 0])
            counts.append(n[n > 0])
            tokens.append(its[which])
            weights.append(chosen.weights[pairs][which])
        parts = (np.concatenate(part) for part in (units, counts, tokens, weights))
        return Selection.of_counts(*parts)
