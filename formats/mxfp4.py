"""MXFP4 as GPT-OSS's checkpoints have it: blocks of 32 values of 4 bits that share a scale.

OCP Microscaling Formats 1.0: a value is e2m1, its scale is 2^(byte - 127). A byte of ``blocks``
holds two values, the low half first. Bundles have GGML's mxfp4, in which a byte holds values i and
i + 16 of a block.
"""

import numpy as np

from .arrays import Float32Array, UInt8Array

POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
VALUES = np.concatenate([POSITIVE, -POSITIVE])
BLOCK = 32


def decode(blocks: UInt8Array, scales: UInt8Array) -> Float32Array:
    """blocks (rows, n, 16), scales (rows, n) uint8 -> (rows, 32 n) float32."""
    values = np.empty((*blocks.shape, 2), dtype=np.float32)
    values[..., 0], values[..., 1] = VALUES[blocks & 15], VALUES[blocks >> 4]
    powers = scales.astype(np.int32)[..., None] - 127
    return np.ldexp(values.reshape(*scales.shape, BLOCK), powers).reshape(len(scales), -1)
