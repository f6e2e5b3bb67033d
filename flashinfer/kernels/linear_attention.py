"""Linear attention: a state in the place of keys and values."""

import numpy as np

from flashinfer.formats.arrays import Float32Array
from flashinfer.kernels import doors
from flashinfer.kernels.doors import checked


@checked(doors.linear_attention)
def linear_attention(
    q: Float32Array,
    k: Float32Array,
    v: Float32Array,
    decay: Float32Array,
    rate: Float32Array,
    state: Float32Array,
    delta: bool = False,
) -> Float32Array:
    """Write what each token brings into a state, and read what it asks for.

    The gated delta rule (Yang et al. 2024) or, without ``delta``, what Mamba-2 does (Dao and Gu
    2024): of each head and token
        S = decay S;  u = rate (v - S^T k), or rate v;  S += k u^T;  y = S^T q

    q, k   (T, G, n): each of the G heads is shared by H / G neighbouring heads of v
    v      (T, H, w); decay, rate (T, H)
    state  (H, n, w), which is changed in place
    Returns y (T, H, w). Tokens are computed one by one, so that T does not change a bit.
    """
    tokens, heads, _ = v.shape
    y, each = np.empty_like(v), heads // max(1, q.shape[1])
    for t in range(tokens):
        queries, keys = (np.repeat(x[t], each, axis=0)[:, :, None] for x in (q, k))  # (H, n, 1)
        state *= decay[t][:, None, None]
        brought = v[t] - (keys * state).sum(axis=1) if delta else v[t]  # (H, w)
        state += keys * (rate[t][:, None] * brought)[:, None]
        y[t] = (queries * state).sum(axis=1)
    return y
