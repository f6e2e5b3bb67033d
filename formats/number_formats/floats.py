"""Numbers that each have their own bytes: the floats of bundles, and those of checkpoints only."""

import numpy as np

from ..arrays import Float32Array, UInt8Array
from ..errors import UserError
from .base import NumberFormat


class F32(NumberFormat):
    name, safetensors, block, block_bytes = "f32", "F32", 1, 4

    def decode(self, raw: UInt8Array) -> Float32Array:
        return np.ascontiguousarray(raw).view("<f4").astype(np.float32, copy=False)

    def encode(self, values: Float32Array) -> UInt8Array:
        return np.ascontiguousarray(values, dtype="<f4").view(np.uint8)


class F16(NumberFormat):
    name, safetensors, block, block_bytes = "f16", "F16", 1, 2

    def decode(self, raw: UInt8Array) -> Float32Array:
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
            return np.ascontiguousarray(raw).view("<f2").astype(np.float32)

    def encode(self, values: Float32Array) -> UInt8Array:
        with np.errstate(over="ignore"):
            halves = np.ascontiguousarray(values).astype("<f2")
        if np.isinf(halves).any() and not np.isinf(values).any():
            raise UserError("values beyond 65504 do not fit f16; use --dtype bf16 or f32")
        return halves.view(np.uint8)


class BF16(NumberFormat):
    name, safetensors, block, block_bytes = "bf16", "BF16", 1, 2

    def decode(self, raw: UInt8Array) -> Float32Array:
        halves = np.ascontiguousarray(raw).view("<u2")
        return (halves.astype(np.uint32) << 16).view(np.float32)

    def encode(self, values: Float32Array) -> UInt8Array:
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        rounded = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded)  # a NaN stays a NaN
        return rounded.astype("<u2").view(np.uint8)


class F64(NumberFormat):
    """Of checkpoints only: rounded to float32 when it is read."""

    name, safetensors, block, block_bytes = "f64", "F64", 1, 8

    def decode(self, raw: UInt8Array) -> Float32Array:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(raw).view("<f8").astype(np.float32)


class F8E4M3(NumberFormat):
    """FP8 of checkpoints, of which fp8.py has the scales: 4 bits of exponent, 3 of mantissa."""

    name, safetensors, block, block_bytes = "f8_e4m3", "F8_E4M3", 1, 1

    def __init__(self) -> None:
        exponents, mantissas = np.divmod(np.arange(128), 8)
        values = np.ldexp(mantissas + 8.0 * (exponents > 0), np.maximum(exponents, 1) - 10)
        values[127] = np.nan  # it has no infinities
        self.values = np.concatenate([values, -values]).astype(np.float32)

    def decode(self, raw: UInt8Array) -> Float32Array:
        return self.values[raw]
