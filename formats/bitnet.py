"""The linear layers of BitNet b1.58 as Hugging Face's checkpoints have them (Ma et al. 2024).

Their weights are -1, 0 or 1 times one scale for each matrix, and what they read is rounded to 8
bits with one scale for each token (see ``kernels.linear``). A byte of a packed matrix of 4 m rows
holds weights of rows i, i + m, i + 2 m and i + 3 m, with 1 added: the first in its lowest two bits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import Float32Array, UInt8Array
from .bounded_json import JsonObject
from .errors import FormatError, shown
from .number_formats import FORMATS, NumberFormat

SCALE = "_scale"  # behind the name of a matrix: its scale
PACKED = 4  # weights in a byte
LEAST = np.float32(1e-5)  # of the mean magnitude that weights are rounded by
KNOWN = {
    "linear_class": ("bitlinear", "autobitlinear"),
    "quantization_mode": ("offline", "online"),
    "use_rms_norm": (False,),
    "modules_to_not_convert": (None, ["lm_head"]),
}


@dataclass(frozen=True)
class BitNet:
    """How a checkpoint's linear layers are stored.

    divided  weights are divided by their scale ("bitlinear"), otherwise multiplied with it
    online   weights are stored as floats, and rounded to -1, 0 or 1 times the mean of their
             matrix's magnitudes
    """

    divided: bool
    online: bool

    @property
    def scales_biases(self) -> bool:
        """Whether biases are multiplied with the scale, too, as they are added before it is."""
        return not (self.divided or self.online)

    def factor(self, scale: Float32Array) -> Any:
        """What weights are multiplied with, of a stored scale."""
        with np.errstate(divide="ignore"):
            return np.float32(1) / scale if self.divided else scale


def of_config(config: JsonObject) -> BitNet | None:
    """The BitNet of a Hugging Face config; None: it is not one. Raises FormatError."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "bitnet":
        return None
    for field, known in KNOWN.items():
        if (value := quantization.get(field, known[0])) not in known:
            raise FormatError(
                f"config: quantization_config of bitnet: {field} {shown(value)} is not supported"
            )
    divided = quantization.get("linear_class", "bitlinear") == "bitlinear"
    online = quantization.get("quantization_mode") == "online" and not divided
    return BitNet(divided, online)


def format_of(shape: tuple[int, ...]) -> NumberFormat:
    """tq2_0, which keeps the weights of a matrix (rows, columns); f16 where its rows are no whole
    blocks of that."""
    ternary = FORMATS["tq2_0"]
    return FORMATS["f16"] if shape[-1] % ternary.block else ternary


def unpacked(packed: UInt8Array, quarter: int) -> Float32Array:
    """packed (m, columns) -> the rows of one quarter of the matrix, -1, 0 and 1 (m, columns)."""
    return (packed >> np.uint8(2 * quarter) & 3).astype(np.float32) - np.float32(1)


def ternary(values: Float32Array, mean: Any) -> Float32Array:
    """Weights rounded to -1, 0 or 1 times ``mean``, that of their whole matrix's magnitudes."""
    scale = np.float32(1) / np.maximum(np.float32(mean), LEAST)
    return np.clip(np.rint(values * scale), -1, 1) / scale
