"""FP8 weights as DeepSeek's and Qwen's checkpoints have them: a scale for each block of a matrix.

A weight is e4m3, and beside X stands X_scale_inv, what the values of each block of 128 rows and 128
columns are multiplied with. No bundle holds it: it is decoded, and requantised.
"""

import numpy as np

from .errors import FormatError, shown
from .numbers import is_whole

SCALE = "_scale_inv"


def is_supported(quantization):
    """Whether ``quantization_config`` is absent or says one of the forms that are decoded."""
    return quantization is None or (
        isinstance(quantization, dict) and quantization.get("quant_method") in ("fp8", "mxfp4")
    )


def block_shape(config):
    """(rows, columns) of the blocks, by a Hugging Face config (a dict). Raises FormatError."""
    quantization = config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if not isinstance(block, list) or len(block) != 2 or not all(is_whole(n, 1) for n in block):
        raise FormatError(
            f"config: FP8 weights need a quantization_config with a weight_block_size of two "
            f"whole numbers, not {shown(block)}"
        )
    return block


def block_of(shape, scales, block):
    """(rows, columns) of the blocks of a tensor, or None where ``scales`` (a shape) are not theirs.

    A matrix of less than a block has one; one of more, whole ones only.
    """
    if not 2 <= len(shape) == len(scales) or 0 in (*shape, *scales):
        return None
    found = tuple(min(n, most) for n, most in zip(shape[-2:], block, strict=True))
    whole = tuple(n * b for n, b in zip(scales[-2:], found, strict=True))
    return found if (*scales[:-2], *whole) == tuple(shape) else None


def scaled(values, scales, block, first=0):
    """Values of rows ``first``.. times their scales.

    values (rows, columns) and scales (blocks of rows, blocks of columns) float32, the latter from
    the block that row ``first`` is in; block: (rows, columns) of each
    """
    rows = (first % block[0] + np.arange(len(values))) // block[0]
    columns = np.arange(values.shape[1]) // block[1]
    with np.errstate(over="ignore", invalid="ignore"):
        return values * scales[rows][:, columns]
