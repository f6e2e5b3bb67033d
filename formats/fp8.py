"""FP8 weights as DeepSeek's and Qwen's checkpoints have them: a scale for each block of a matrix.

A weight is e4m3. The tensor X_scale_inv beside X holds the factor of each block of 128 rows and 128
columns. A bundle never holds FP8: conversion decodes it and writes one of the bundle's number
formats.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import Float32Array
from .bounded_json import JsonObject
from .errors import FormatError, shown
from .numbers import is_whole

SCALE = "_scale_inv"


def is_supported(quantization: Any) -> bool:
    """Whether a config's ``quantization_config`` is absent or names a form that is decoded."""
    known = ("fp8", "mxfp4", "bitnet")
    return quantization is None or (
        isinstance(quantization, dict) and quantization.get("quant_method") in known
    )


def block_shape(config: JsonObject) -> tuple[int, int]:
    """(rows, columns) of a block, from a Hugging Face config. Raises FormatError."""
    quantization = config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if not isinstance(block, list) or len(block) != 2 or not all(is_whole(n, 1) for n in block):
        raise FormatError(
            f"config: FP8 weights need a quantization_config with a weight_block_size of two "
            f"whole numbers, not {shown(block)}"
        )
    return block[0], block[1]


def block_of(
    shape: Sequence[int], scales: Sequence[int], block: tuple[int, int]
) -> tuple[int, int] | None:
    """(rows, columns) of the blocks of a tensor, or None where its scales do not fit it.

    shape, scales  the shapes of the tensor and of its scales
    block          the config's block; a matrix smaller than it is one block, a larger one must
                   consist of whole blocks
    """
    if not 2 <= len(shape) == len(scales) or 0 in (*shape, *scales):
        return None
    rows, columns = min(shape[-2], block[0]), min(shape[-1], block[1])
    whole = (*scales[:-2], scales[-2] * rows, scales[-1] * columns)
    return (rows, columns) if whole == tuple(shape) else None


def scaled(
    values: Float32Array, scales: Float32Array, block: tuple[int, int], first: int = 0
) -> Float32Array:
    """The rows of an FP8 matrix from ``first`` on, times their scales.

    values  (rows, columns) float32, decoded
    scales  (blocks down, blocks across) float32, from the block that holds row ``first``
    block   (rows, columns) of a block
    """
    rows = (first % block[0] + np.arange(len(values))) // block[0]
    columns = np.arange(values.shape[1]) // block[1]
    with np.errstate(over="ignore", invalid="ignore"):
        return values * scales[rows][:, columns]
