"""Which experts of a mixture tokens use, and which of their neurons."""

import math
from typing import Any

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import BoolArray, Float32Array, Int32Array
from flashinfer.formats.layers.ffn import RouterConfig
from flashinfer.paper.interfaces import Chooser, Map, Stream, Tap
from flashinfer.paper.neurons import neurons_of
from flashinfer.paper.predictor import Predictor
from flashinfer.paper.selection import Selection
from flashinfer.paper.sparse_mixer import sparse_mix

SURE = 0.5  # of an early guess of experts, where only the surest are to be read


class Router:
    """A mixture of experts' own choice for each token, by the scores weight . x + bias.

    weight  weights.Resident (experts, d_model)
    bias, choice_bias  (experts,) float32, or None
    expert_scales      (experts,) float32: what weights are multiplied with at last, or None
    norm               of the hidden state that it reads in the place of the FFN's input, or None
    """

    in_dram = True

    def __init__(
        self,
        config: RouterConfig,
        weight: Any,
        bias: Float32Array | None,
        choice_bias: Float32Array | None,
        expert_scales: Float32Array | None = None,
    ) -> None:
        self.config, self.weight = config, weight
        self.bias, self.choice_bias = bias, choice_bias
        self.expert_scales = expert_scales
        self.norm: Map | None = None
        self.chosen: Selection | None = None  # by the layer's input, where the router reads that
        self.tap: Tap | None = None

    def set_tap(self, tap: Tap | None) -> None:
        """Tell ``tap`` scores and choices from now on; None: nobody."""
        self.tap = tap

    def streams(self) -> tuple[Stream, ...]:
        """What is streamed at every token: nothing."""
        return ()

    def scores(self, x: Float32Array) -> Float32Array:
        """x (T, d_model), what it reads -> (T, experts) float32."""
        if self.norm is None:
            return self.weight.linear(x, self.bias)
        scores = self.weight.linear(self.norm(x), self.bias)
        return scores * np.float32(x.shape[1] ** -0.5)

    def read_of(self, x: Float32Array, residual: Float32Array | None) -> Float32Array:
        """What it reads of an FFN's input: ``x``, or ``residual``, which is that before the norm;
        None: ``x`` is what it reads already."""
        return residual if self.config.reads_residual and residual is not None else x

    def choose(self, scores: Float32Array, n: int) -> tuple[Int32Array, Float32Array]:
        """scores (T, experts) -> the n experts of each token, ascending (T, n), their weights."""
        config = self.config
        if config.scoring == "sparsemixer":
            return sparse_mix(scores, n, config.jitter)
        chosen, weights = kernels.route(
            scores, n, config.normalised, config.scoring, self.choice_bias, config.groups,
            config.groups_kept, config.scale, config.group_by,
        )  # fmt: skip
        if self.expert_scales is not None:
            weights = weights * self.expert_scales[chosen]
        return chosen, weights

    def choose_early(self, h: Float32Array) -> Selection:
        """h (T, d_model), the layer's input, where the router reads that -> what ``select`` returns
        from now on."""
        self.chosen = self._selection(h)
        return self.chosen

    def select(self, x: Float32Array, residual: Float32Array | None) -> Selection:
        """x (T, d_model) -> the Selection of the experts, with their weights."""
        if self.config.early:
            assert self.chosen is not None
            return self.chosen
        return self._selection(self.read_of(x, residual))

    def _selection(self, x: Float32Array) -> Selection:
        scores = self.scores(x)
        chosen, weights = self.choose(scores, self.config.experts_per_token)
        if self.tap:
            self.tap(router=scores, choices=chosen, choice_weights=weights)
        return Selection.of_choices(chosen, weights)

    def named(self, x: Float32Array, share: float = 1.0) -> BoolArray:
        """x (T, d_model), what it reads -> (T, experts) bool: those that it would choose, the
        surest ``share``."""
        scores = self.scores(x)
        chosen, _ = self.choose(scores, math.ceil(self.config.experts_per_token * share))
        named = np.zeros(scores.shape, dtype=bool)
        np.put_along_axis(named, chosen, True, axis=1)
        return named

    def weights(self, x: Float32Array) -> Float32Array:
        """x (T, d_model), what it reads -> what each expert counts for each token (T, experts)
        float32: 0 where it is not chosen."""
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
        """(experts worth reading, experts worth keeping) by x (1, d_model), or by ``residual``
        where the router reads a layer's input; neither is final yet. Of the experts that it would
        choose the surest ``share`` is worth reading, as a wrong read costs megabytes; more than it
        would choose may still be chosen.
        """
        scores = self.scores(self.read_of(x, residual))
        per_token = self.config.experts_per_token
        surest, _ = self.choose(scores, math.ceil(per_token * share))
        likely, _ = self.choose(scores, min(per_token * 3 // 2, self.config.reach))
        return surest[0], likely[0]


class RoutedPredictor(Predictor):
    """Of the experts that a Router chooses, the neurons that are predicted active.

    neurons  of each expert; the others as Predictor's
    """

    def __init__(self, router: Router, neurons: int, *weights: Any, **form: Any) -> None:
        super().__init__(*weights, **form)
        self.router, self.neurons = router, neurons

    def set_tap(self, tap: Tap | None) -> None:
        """Tell ``tap`` the router's scores and choices from now on; None: nobody."""
        self.router.set_tap(tap)

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


def router_of(chooser: Chooser | None) -> Router | None:
    """The router that chooses, by itself or before a predictor; None: there is none."""
    if isinstance(chooser, RoutedPredictor):
        return chooser.router
    return chooser if isinstance(chooser, Router) else None
