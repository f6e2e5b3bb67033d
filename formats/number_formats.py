"""Number formats: how a row of weights lies in bytes, and its float32 values.

A row is a run of blocks. f32, f16 and bf16 have blocks of one value. Adding a format is one
subclass here and one loader in ``_native/vectors.h``.
"""

import numpy as np

from .errors import UserError


class NumberFormat:
    """One way to write a row of numbers.

    name         the name users type (``--dtype``)
    code         the number the compiled kernels know it by
    safetensors  the dtype that the safetensors header gives it
    block        values in a block; block_bytes, bytes in a block
    """

    name = safetensors = ""
    code = block = block_bytes = 0

    def row_bytes(self, columns):
        """Bytes of a row of ``columns`` values. Raises UserError where blocks do not divide it."""
        if columns % self.block:
            raise UserError(f"{self.name} needs rows of a multiple of {self.block}, not {columns}")
        return columns // self.block * self.block_bytes

    def decode(self, raw):
        """raw (..., row_bytes) uint8 -> (..., columns) float32."""
        raise NotImplementedError

    def encode(self, values):
        """values (..., columns) float32 -> (..., row_bytes) uint8, rounded to nearest even."""
        raise NotImplementedError


class F32(NumberFormat):
    name, safetensors, code, block, block_bytes = "f32", "F32", 0, 1, 4

    def decode(self, raw):
        return np.ascontiguousarray(raw).view("<f4").astype(np.float32, copy=False)

    def encode(self, values):
        return np.ascontiguousarray(values, dtype="<f4").view(np.uint8)


class F16(NumberFormat):
    name, safetensors, code, block, block_bytes = "f16", "F16", 1, 1, 2

    def decode(self, raw):
        return np.ascontiguousarray(raw).view("<f2").astype(np.float32)

    def encode(self, values):
        with np.errstate(over="ignore"):
            halves = np.ascontiguousarray(values).astype("<f2")
        if np.isinf(halves).any() and not np.isinf(values).any():
            raise UserError("values beyond 65504 do not fit f16; use --dtype bf16 or f32")
        return halves.view(np.uint8)


class BF16(NumberFormat):
    name, safetensors, code, block, block_bytes = "bf16", "BF16", 2, 1, 2

    def decode(self, raw):
        halves = np.ascontiguousarray(raw).view("<u2")
        return (halves.astype(np.uint32) << 16).view(np.float32)

    def encode(self, values):
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        rounded = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded)  # a NaN stays a NaN
        return rounded.astype("<u2").view(np.uint8)


FORMATS = {format.name: format for format in (F32(), F16(), BF16())}
BY_SAFETENSORS = {format.safetensors: format for format in FORMATS.values()}


def number_format(name):
    """The NumberFormat called ``name``. Raises UserError naming those there are."""
    if name not in FORMATS:
        raise UserError(f"unknown number format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]
