"""Which units tokens use: what a predictor or a router answers, and what a layer computes."""

import itertools
from typing import NamedTuple

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import AnyArray, Float32Array, Int32Array


class Tokens(NamedTuple):
    """Which tokens a layer computes together.

    first  number of the first of them; neuron caches count by these
    sure   how many of them, the first ones, belong to the text; the others are drafts
    """

    first: int
    sure: int

    @property
    def now(self) -> int:
        """The last that belongs to the text."""
        return self.first + self.sure - 1


class Selection:
    """The units that T tokens use: their union, and who uses which.

    units         (n,) int32 ascending
    indptr, tokens  unit i is used by tokens[indptr[i]:indptr[i + 1]], int32; None where every
                    token uses every one of them
    last            (n,) int32: the last token that uses each
    weights         float32: what the units' outputs are multiplied with, as ``tokens`` or, where
                    that is None, as ``units``; None: 1
    """

    def __init__(
        self,
        units: Int32Array,
        indptr: Int32Array | None,
        tokens: Int32Array | None,
        last: Int32Array,
        weights: Float32Array | None = None,
    ) -> None:
        self.units, self.indptr, self.tokens, self.last = units, indptr, tokens, last
        self.weights = weights

    @classmethod
    def of_scores(cls, scores: Float32Array) -> "Selection":
        """From a predictor's scores (T, d_ffn)."""
        if len(scores) == 1:
            units = kernels.positive(np.ascontiguousarray(scores[0], dtype=np.float32))
            return cls(units, None, None, np.zeros(len(units), dtype=np.int32))
        active = np.ascontiguousarray((scores > 0).T)  # (d_ffn, T)
        counts = np.count_nonzero(active, axis=1)
        used = np.flatnonzero(counts)
        return cls.of_counts(used, counts[used], np.flatnonzero(active) % len(scores))

    @classmethod
    def of_choices(cls, chosen: AnyArray, weights: Float32Array) -> "Selection":
        """From what each token chose, ascending (T, k), and the weights (T, k)."""
        n_tokens, per_token = chosen.shape
        if n_tokens == 1:
            none = np.zeros(per_token, dtype=np.int32)
            return cls(chosen[0].astype(np.int32), None, None, none, weights[0])
        order = np.argsort(chosen, axis=None, kind="stable")
        units, counts = np.unique(chosen, return_counts=True)
        return cls.of_counts(units, counts, order // per_token, weights.ravel()[order])

    @classmethod
    def of_counts(
        cls,
        units: AnyArray,
        counts: AnyArray,
        tokens: AnyArray,
        weights: Float32Array | None = None,
    ) -> "Selection":
        """From each unit's number of tokens (n,), and these, unit after unit."""
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        tokens = tokens.astype(np.int32)
        return cls(units.astype(np.int32), indptr, tokens, tokens[indptr[1:] - 1], weights)

    @classmethod
    def everything(cls, n_units: int, n_tokens: int) -> "Selection":
        last = np.full(n_units, n_tokens - 1, dtype=np.int32)
        return cls(np.arange(n_units, dtype=np.int32), None, None, last)

    def pairs(self) -> list[slice]:
        """Of each unit, which of ``tokens`` (and of ``weights``) are its: slices."""
        return [slice(*ends) for ends in itertools.pairwise(self.indptr)]

    def between(self, first: int, stop: int) -> "Selection":
        """What the tokens first:stop use, which keep their numbers."""
        if self.indptr is None or not len(self.units):
            return self
        used = (self.tokens >= first) & (self.tokens < stop)
        counts = np.add.reduceat(used.astype(np.int32), self.indptr[:-1])
        weights = None if self.weights is None else self.weights[used]
        some = counts > 0
        return Selection.of_counts(self.units[some], counts[some], self.tokens[used], weights)

    def part(self, first: int, stop: int) -> "Selection":
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
