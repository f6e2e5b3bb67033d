"""Which units a token uses, before their weights are read: neurons, or a mixture's experts.

A predictor guesses which neurons will fire (paper section 3.1); a router knows its experts; the two
together, where experts have a ReLU. All answer ``select(x, residual)`` with a Selection.
"""

import itertools
import math

import numpy as np

from flashinfer import kernels
from flashinfer.neurons import neurons_of

SURE = 0.5  # of an early guess of experts, where only the surest are to be read


class Predictor:
    """Low rank: scores = B f(A x) + bias; a neuron is predicted active where its score is > 0.

    a (rank, d_model) and b (d_ffn, rank) are weights.Resident or weights.Streamed, bias (d_ffn,)
    float32. The paper's sigmoid and threshold are folded into the bias: sigmoid(s) > t is
    s > log(t / (1 - t)).

    between  f: "" for none, or "relu"
    reads    x: "normed", what the FFN reads, or "residual", what its norm reads
    """

    def __init__(self, a, b, bias, between="", reads="normed"):
        self.a, self.b, self.bias = a, b, bias
        self.between, self.reads = between, reads

    def scores(self, x, residual, neurons=None):
        """The FFN's input after and before its norm, each (T, d_model) -> (T, d_ffn) float32, or
        (T, n) of ``neurons`` (n,) alone."""
        inner = self.a.linear(residual if self.reads == "residual" else x)
        if self.between == "relu":
            np.maximum(inner, 0, out=inner)
        if neurons is not None:
            return self.b.some(inner, neurons, self.bias[neurons])
        return self.b.linear(inner, self.bias)

    def select(self, x, residual):
        """The Selection of the neurons predicted active."""
        return Selection.of_scores(self.scores(x, residual))

    def early(self, x, residual, share=1.0):
        """(neurons worth reading, neurons worth keeping) by x, which is not final yet."""
        units = self.select(x, residual).units
        return units, units

    @property
    def in_dram(self):
        return self.a.in_dram and self.b.in_dram


class Router:
    """A mixture of experts' own choice: for each token those of the largest weight . x.

    weight      weights.Resident (experts, d_model); bias (experts,) float32, or None
    per_token   how many are chosen
    normalised  their weights, by a softmax over all experts, are made to add up to 1
    """

    in_dram = True

    def __init__(self, weight, bias, per_token, normalised):
        self.weight, self.bias = weight, bias
        self.per_token, self.normalised = per_token, normalised

    def scores(self, x):
        """x (T, d_model) -> (T, experts) float32: the largest are chosen."""
        return self.weight.linear(x, self.bias)

    def select(self, x, residual):
        """x (T, d_model) -> the Selection of the experts, with their weights."""
        return Selection.of_choices(*kernels.route(self.scores(x), self.per_token, self.normalised))

    def weights(self, x):
        """What each expert counts for each token (T, experts) float32: 0 where it is not chosen."""
        chosen = self.select(x, None)
        weights = np.zeros((len(x), len(self.weight.matrix.data)), dtype=np.float32)
        if chosen.indptr is None:
            weights[0, chosen.units] = chosen.weights
        else:
            which = np.repeat(chosen.units, np.diff(chosen.indptr))
            weights[chosen.tokens, which] = chosen.weights
        return weights

    def early(self, x, residual, share=1.0):
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

    def __init__(self, router, neurons, *weights, **form):
        super().__init__(*weights, **form)
        self.router, self.neurons = router, neurons

    def select(self, x, residual):
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


class Selection:
    """The units that T tokens use: their union, and who uses which.

    units         (n,) int32 ascending
    indptr, tokens  unit i is used by tokens[indptr[i]:indptr[i + 1]], int32; None where every
                    token uses every one of them
    last            (n,) int32: the last token that uses each
    weights         float32: what the units' outputs are multiplied with, as ``tokens`` or, where
                    that is None, as ``units``; None: 1
    """

    def __init__(self, units, indptr, tokens, last, weights=None):
        self.units, self.indptr, self.tokens, self.last = units, indptr, tokens, last
        self.weights = weights

    @classmethod
    def of_scores(cls, scores):
        """From a predictor's scores (T, d_ffn)."""
        if len(scores) == 1:
            units = kernels.positive(np.ascontiguousarray(scores[0], dtype=np.float32))
            return cls(units, None, None, np.zeros(len(units), dtype=np.int32))
        active = np.ascontiguousarray((scores > 0).T)  # (d_ffn, T)
        counts = np.count_nonzero(active, axis=1)
        units = np.flatnonzero(counts)
        return cls.of_counts(units, counts[units], np.flatnonzero(active) % len(scores))

    @classmethod
    def of_choices(cls, chosen, weights):
        """From what each token chose, ascending (T, k), and the weights (T, k)."""
        n_tokens, per_token = chosen.shape
        if n_tokens == 1:
            none = np.zeros(per_token, dtype=np.int32)
            return cls(chosen[0].astype(np.int32), None, None, none, weights[0])
        order = np.argsort(chosen, axis=None, kind="stable")
        units, counts = np.unique(chosen, return_counts=True)
        return cls.of_counts(units, counts, order // per_token, weights.ravel()[order])

    @classmethod
    def of_counts(cls, units, counts, tokens, weights=None):
        """From each unit's number of tokens (n,), and these, unit after unit."""
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        tokens = tokens.astype(np.int32)
        return cls(units.astype(np.int32), indptr, tokens, tokens[indptr[1:] - 1], weights)

    @classmethod
    def everything(cls, n_units, n_tokens):
        last = np.full(n_units, n_tokens - 1, dtype=np.int32)
        return cls(np.arange(n_units, dtype=np.int32), None, None, last)

    def pairs(self):
        """Of each unit, which of ``tokens`` (and of ``weights``) are its: slices."""
        return [slice(*ends) for ends in itertools.pairwise(self.indptr)]

    def part(self, first, stop):
        """The units numbered first:stop of these."""
        stop = min(stop, len(self.units))
        units, last = self.units[first:stop], self.last[first:stop]
        begin, end = first, stop
        if self.indptr is not None:
            begin, end = self.indptr[first], self.indptr[stop]
        weights = None if self.weights is None else self.weights[begin:end]
        if self.indptr is None:
            return Selection(units, None, None, last, weights)
        indptr = self.indptr[first : stop + 1] - begin
        return Selection(units, indptr, self.tokens[begin:end], last, weights)
