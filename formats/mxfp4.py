"""MXFP4 as GPT-OSS's checkpoints have it: blocks of 32 values of 4 bits with a power of two.

OCP Microscaling Formats 1.0: a value is e2m1, its scale 2^(byte - 127). Here ``blocks`` hold two
values a byte, the low half first. No bundle holds it: it is decoded, and requantised.
"""

import numpy as np

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
VALUES = np.concatenate([VALUES, -VALUES])
BLOCK = 32


def decode(blocks, scales):
    """blocks (rows, n, 16), scales (rows, n) uint8 -> (rows, 32 n) float32."""
    values = np.empty((*blocks.shape, 2), dtype=np.float32)
    values[..., 0], values[..., 1] = VALUES[blocks & 15], VALUES[blocks >> 4]
    powers = scales.astype(np.int32)[..., None] - 127
    return np.ldexp(values.reshape(*scales.shape, BLOCK), powers).reshape(len(scales), -1)
