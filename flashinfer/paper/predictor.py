"""Which neurons tokens will use, before their weights are read (paper section 3.1).

A Predictor, a Router and both together (see router.py) answer ``select(x, residual)`` with a
Selection.
"""

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float32Array, Int32Array
from flashinfer.paper.interfaces import LowRankMap, Stream, Tap
from flashinfer.paper.selection import Selection


class Predictor:
    """Low rank: scores = B f(A x) + bias; a neuron is predicted active where its score is > 0.

    a (rank, d_model) and b (d_ffn, rank) are weights.Resident or weights.Streamed, bias (d_ffn,)
    float32. The paper's sigmoid and threshold are folded into the bias: sigmoid(s) > t is
    s > log(t / (1 - t)).

    between  f: "" for none, or "relu"
    reads    x: "normed", what the FFN reads, or "residual", what its norm reads
    """

    def __init__(
        self,
        a: LowRankMap,
        b: LowRankMap,
        bias: Float32Array,
        between: str = "",
        reads: str = "normed",
    ) -> None:
        self.a, self.b, self.bias = a, b, bias
        self.between, self.reads = between, reads
        self.tap: Tap | None = None

    def set_tap(self, tap: Tap | None) -> None:
        """Tell ``tap`` the neurons that it names from now on; None: nobody."""
        self.tap = tap

    def scores(
        self, x: Float32Array, residual: Float32Array | None, neurons: AnyArray | None = None
    ) -> Float32Array:
        """The FFN's input after and before its norm, each (T, d_model) -> (T, d_ffn) float32, or
        (T, n) of ``neurons`` (n,) alone."""
        inner = self.a.linear(residual if self.reads == "residual" else x)
        if self.between == "relu":
            np.maximum(inner, 0, out=inner)
        if neurons is not None:
            return self.b.some(inner, neurons, self.bias[neurons])
        return self.b.linear(inner, self.bias)

    def select(self, x: Float32Array, residual: Float32Array | None) -> Selection:
        """The Selection of the neurons predicted active."""
        scores = self.scores(x, residual)
        if self.tap:
            self.tap(predicted=scores > 0)
        return Selection.of_scores(scores)

    def early(
        self, x: Float32Array, residual: Float32Array | None, share: float = 1.0
    ) -> tuple[Int32Array, Int32Array]:
        """(neurons worth reading, neurons worth keeping) by x, which is not final yet."""
        units = self.select(x, residual).units
        return units, units

    def streams(self) -> tuple[Stream, ...]:
        """Which of its matrices are streamed at every token, in this order."""
        return (*self.a.streams(), *self.b.streams())

    @property
    def in_dram(self) -> bool:
        return self.a.in_dram and self.b.in_dram
