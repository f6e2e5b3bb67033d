"""Number formats: how a row of weights lies in bytes, and its float32 values.

A row is a run of blocks. f32, f16 and bf16 have blocks of one value; q8_0 and q4_0 are GGML's:
32 values that share a float16 scale. A new format is one subclass here, listed in FORMATS, and what
``_native/formats.h`` says, where the compiled kernels have their table.
"""

import numpy as np

from .arrays import Float32Array, Int8Array, UInt8Array
from .errors import UserError


class NumberFormat:
    """One way to write a row of numbers.

    name         the name users type (``--dtype``)
    safetensors  the dtype that the safetensors header gives it; U8 where it has no name for it
    block        values in a block; block_bytes, bytes in a block
    """

    name = safetensors = ""
    block = block_bytes = 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` values. Raises UserError where blocks do not divide it."""
        if columns % self.block:
            raise UserError(f"{self.name} needs rows of a multiple of {self.block}, not {columns}")
        return columns // self.block * self.block_bytes

    def decode(self, raw: UInt8Array) -> Float32Array:
        """raw (..., row_bytes) uint8 -> (..., columns) float32."""
        raise NotImplementedError

    def encode(self, values: Float32Array) -> UInt8Array:
        """values (..., columns) float32 -> (..., row_bytes) uint8, rounded to nearest even."""
        raise NotImplementedError


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


class BlockFormat(NumberFormat):
    """Blocks of 32 whole numbers that share a scale."""

    safetensors, block = "U8", 32

    def quants(self, raw: UInt8Array) -> tuple[Float32Array, Int8Array]:
        """raw (..., row_bytes) -> scales (..., blocks, 1) float32, (..., blocks, 32) int8."""
        raise NotImplementedError

    def decode(self, raw: UInt8Array) -> Float32Array:
        scales, quants = self.quants(raw)
        return (quants * scales).reshape(*raw.shape[:-1], quants.shape[-2] * self.block)


class Q8_0(BlockFormat):
    """GGML's q8_0: a float16 scale, then 32 int8; value = scale * q."""

    name, block_bytes = "q8_0", 34

    def quants(self, raw: UInt8Array) -> tuple[Float32Array, Int8Array]:
        scales, quants = _blocks(raw, self)
        return scales, quants.view(np.int8)

    def encode(self, values: Float32Array) -> UInt8Array:
        scales, quants = self.rounded(values)
        return _pack(scales, quants.view(np.uint8), values)

    def rounded(self, values: Float32Array) -> tuple[Float32Array, Int8Array]:
        """values (..., columns) -> scales (..., blocks, 1) float32, (..., blocks, 32) int8."""
        x = _in_blocks(values, self)
        scales = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        scaled = x * _inverse(scales)
        quants = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))  # half away from zero
        return scales, np.where(np.isfinite(quants), quants, 0).astype(np.int8)


class Q4_0(BlockFormat):
    """GGML's q4_0: a float16 scale, then 32 values of 4 bits; value = scale * (q - 8).

    Byte j holds value j in its low and value j + 16 in its high half.
    """

    name, block_bytes = "q4_0", 18

    def quants(self, raw: UInt8Array) -> tuple[Float32Array, Int8Array]:
        scales, packed = _blocks(raw, self)
        return scales, np.concatenate([packed & 15, packed >> 4], -1).view(np.int8) - np.int8(8)

    def encode(self, values: Float32Array) -> UInt8Array:
        x = _in_blocks(values, self)
        largest = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
        scales = largest / np.float32(-8)  # the largest in magnitude becomes -8 exactly
        quants = np.minimum(15, np.trunc(x * _inverse(scales) + np.float32(8.5))).astype(np.uint8)
        return _pack(scales, quants[..., :16] | quants[..., 16:] << 4, values)


def _blocks(raw: UInt8Array, format: BlockFormat) -> tuple[Float32Array, UInt8Array]:
    """raw (..., row_bytes) -> scales (..., blocks, 1) float32, the blocks' other bytes uint8."""
    n = raw.shape[-1] // format.block_bytes
    blocks = np.ascontiguousarray(raw).reshape(*raw.shape[:-1], n, format.block_bytes)
    return F16().decode(blocks[..., :2]), blocks[..., 2:].copy()


def _in_blocks(values: Float32Array, format: BlockFormat) -> Float32Array:
    """values (..., columns) -> (..., blocks, values of each)."""
    n = values.shape[-1] // format.block
    return np.asarray(values, dtype=np.float32).reshape(*values.shape[:-1], n, format.block)


def _inverse(scales: Float32Array) -> Float32Array:
    """1 / scales, and 0 of a scale of 0."""
    with np.errstate(divide="ignore"):
        return np.where(scales == 0, np.float32(0), np.float32(1) / scales)


def _pack(scales: Float32Array, quants: UInt8Array, values: Float32Array) -> UInt8Array:
    """scales (..., blocks, 1) and quants (..., blocks, bytes of each), the encoded ``values``
    (..., columns) -> (..., row_bytes)."""
    raw = np.concatenate([FORMATS["f16"].encode(scales), quants], axis=-1)
    return raw.reshape(*values.shape[:-1], raw.shape[-2] * raw.shape[-1])


FORMATS: dict[str, NumberFormat] = {
    format.name: format for format in (F32(), F16(), BF16(), Q8_0(), Q4_0())
}
BY_SAFETENSORS = {f.safetensors: f for f in FORMATS.values() if f.block == 1}
# What a checkpoint's tensors are decoded from.
SOURCES: dict[str, NumberFormat] = {
    **BY_SAFETENSORS, **{format.safetensors: format for format in (F64(), F8E4M3())}
}  # fmt: skip


def number_format(name: str) -> NumberFormat:
    """The NumberFormat called ``name``. Raises UserError naming those there are."""
    if name not in FORMATS:
        raise UserError(f"unknown number format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]
