"""Causal self-attention with a key/value cache."""

import numpy as np

from flashinfer import kernels

LANES = 32  # a head's width in the key/value cache is padded to whole vectors


def padded_width(head_dim):
    return -(-head_dim // LANES) * LANES


class Attention:
    """A layer's attention: project, remember, attend, project.

    q, k, v, o     weights.Resident or weights.Streamed, (d_model, d_model)
    biases         {"q": (d_model,) float32, ...} or None for each
    keys, values   (heads, context, padded head_dim), float16 or float32
    """

    def __init__(self, n_heads, q, k, v, o, biases, keys, values):
        self.n_heads, self.q, self.k, self.v, self.o = n_heads, q, k, v, o
        self.biases, self.keys, self.values = biases, keys, values

    def __call__(self, x, start):
        """x (T, d_model), the tokens at positions start.. -> (T, d_model)."""
        n, head_dim = len(x), x.shape[1] // self.n_heads
        shape = (n, self.n_heads, head_dim)
        q = self.q.linear(x, self.biases["q"]).reshape(shape)
        k = self.k.linear(x, self.biases["k"]).reshape(shape)
        v = self.v.linear(x, self.biases["v"]).reshape(shape)
        self.keys[:, start : start + n, :head_dim] = k.transpose(1, 0, 2)
        self.values[:, start : start + n, :head_dim] = v.transpose(1, 0, 2)
        width = self.keys.shape[2]
        padded = np.zeros((n, self.n_heads, width), dtype=np.float32)
        padded[:, :, :head_dim] = q * np.float32(head_dim**-0.5)
        out = kernels.attention(padded, self.keys, self.values, start)  # (T, heads, width)
        out = np.ascontiguousarray(out[:, :, :head_dim]).reshape(n, -1)
        return self.o.linear(out, self.biases["o"])
