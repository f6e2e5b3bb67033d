"""Which neurons will fire, before their weights are read (paper section 3.1)."""

import numpy as np


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

    def scores(self, x, residual):
        """The FFN's input after and before its norm, each (T, d_model) -> (T, d_ffn) float32."""
        inner = self.a.linear(residual if self.reads == "residual" else x)
        if self.between == "relu":
            np.maximum(inner, 0, out=inner)
        return self.b.linear(inner, self.bias)

    @property
    def in_dram(self):
        return self.a.in_dram and self.b.in_dram


class Selection:
    """The neurons that T tokens use: their union, and who uses which.

    neurons         (n,) int32 ascending
    indptr, tokens  neuron i is used by tokens[indptr[i]:indptr[i + 1]], int32; None where every
                    token uses every one of them
    last            (n,) int32: the last token that uses each
    """

    def __init__(self, neurons, indptr, tokens, last):
        self.neurons, self.indptr, self.tokens, self.last = neurons, indptr, tokens, last

    @classmethod
    def of_scores(cls, scores):
        """From the predictor's scores (T, d_ffn)."""
        if len(scores) == 1:
            neurons = np.flatnonzero(scores[0] > 0).astype(np.int32)
            return cls(neurons, None, None, np.zeros(len(neurons), dtype=np.int32))
        active = np.ascontiguousarray((scores > 0).T)  # (d_ffn, T)
        counts = np.count_nonzero(active, axis=1)
        neurons = np.flatnonzero(counts).astype(np.int32)
        indptr = np.zeros(len(neurons) + 1, dtype=np.int32)
        np.cumsum(counts[neurons], out=indptr[1:])
        tokens = (np.flatnonzero(active) % len(scores)).astype(np.int32)
        return cls(neurons, indptr, tokens, tokens[indptr[1:] - 1])

    @classmethod
    def everything(cls, n_neurons, n_tokens):
        last = np.full(n_neurons, n_tokens - 1, dtype=np.int32)
        return cls(np.arange(n_neurons, dtype=np.int32), None, None, last)

    def part(self, first, stop):
        """The neurons numbered first:stop of these."""
        stop = min(stop, len(self.neurons))
        neurons, last = self.neurons[first:stop], self.last[first:stop]
        if self.indptr is None:
            return Selection(neurons, None, None, last)
        begin, end = self.indptr[first], self.indptr[stop]
        indptr = self.indptr[first : stop + 1] - begin
        return Selection(neurons, indptr, self.tokens[begin:end], last)
