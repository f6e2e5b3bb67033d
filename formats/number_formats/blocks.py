"""GGML's blocks of 32 values that share a scale, and some of them a minimum."""

import numpy as np

from ..arrays import AnyArray, Float32Array, Int8Array, UInt8Array
from ..errors import UserError
from .base import BlockFormat, Groups
from .floats import F16

HALF = F16()
# What the 4 bits of iq4_nl and iq4_xs stand for: steps that are finer near zero.
UNEVEN = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
                  dtype=np.int8)  # fmt: skip
# What those of MXFP4 stand for (e2m1), doubled, so that they are whole.
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.int8)


class Q8_0(BlockFormat):
    """A float16 scale, then 32 int8; value = scale * q."""

    name, block_bytes = "q8_0", 34

    def groups(self, raw: UInt8Array) -> Groups:
        scales, quants = self.fields(raw, 2, 32)
        return Groups(HALF.decode(scales)[..., 0], quants.view(np.int8))

    def encode(self, values: Float32Array) -> UInt8Array:
        scales, quants = self.rounded(values)
        return self.packed(half(scales), quants.view(np.uint8))

    def rounded(self, values: Float32Array) -> tuple[Float32Array, Int8Array]:
        """values (..., columns) -> scales (..., blocks, 1) float32, (..., blocks, 32) int8."""
        x = self.in_groups(values)[..., 0, :]
        scales = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        scaled = x * inverse(scales)
        quants = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))  # half away from zero
        return scales, np.where(np.isfinite(quants), quants, 0).astype(np.int8)


class Signed(BlockFormat):
    """A float16 scale, then values of ``bits`` bits; value = scale * (q - 2^(bits - 1)).

    Byte j holds value j in its low and value j + 16 in its high half; fifth bits come before them.
    """

    bits = 4

    def groups(self, raw: UInt8Array) -> Groups:
        scales, quants = self.fields(raw, 2, self.block_bytes - 2)
        zero = np.int8(1 << (self.bits - 1))
        return Groups(HALF.decode(scales)[..., 0], unpacked(quants) - zero)

    def encode(self, values: Float32Array) -> UInt8Array:
        x, zero = self.in_groups(values)[..., 0, :], 1 << (self.bits - 1)
        scales = largest(x) / np.float32(-zero)  # the largest in magnitude becomes -zero exactly
        q = np.trunc(x * inverse(scales) + np.float32(zero + 0.5))
        q = np.minimum(2 * zero - 1, np.where(np.isfinite(q), q, 0)).astype(np.uint8)
        return self.packed(half(scales), *packed(q, self.bits))


class Q4_0(Signed):
    name, block_bytes = "q4_0", 18


class Q5_0(Signed):
    name, block_bytes, bits = "q5_0", 22, 5


class Unsigned(BlockFormat):
    """A float16 scale, a float16 least value, ``bits`` bits each; value = scale * q + least."""

    bits = 4

    def groups(self, raw: UInt8Array) -> Groups:
        scales, least, quants = self.fields(raw, 2, 2, self.block_bytes - 4)
        minima = -HALF.decode(least)[..., 0]
        return Groups(HALF.decode(scales)[..., 0], unpacked(quants), minima)

    def encode(self, values: Float32Array) -> UInt8Array:
        x, most = self.in_groups(values)[..., 0, :], (1 << self.bits) - 1
        least = x.min(axis=-1, keepdims=True)
        scales = (x.max(axis=-1, keepdims=True) - least) / np.float32(most)
        q = np.trunc((x - least) * inverse(scales) + np.float32(0.5))
        q = np.clip(np.where(np.isfinite(q), q, 0), 0, most).astype(np.uint8)
        return self.packed(half(scales), half(least), *packed(q, self.bits))


class Q4_1(Unsigned):
    name, block_bytes = "q4_1", 20


class Q5_1(Unsigned):
    name, block_bytes, bits = "q5_1", 24, 5


class IQ4_NL(BlockFormat):
    """A float16 scale, then 32 values of 4 bits; value = scale * UNEVEN[q], packed as q4_0."""

    name, block_bytes = "iq4_nl", 18

    def groups(self, raw: UInt8Array) -> Groups:
        scales, quants = self.fields(raw, 2, 16)
        return Groups(HALF.decode(scales)[..., 0], UNEVEN[unpacked(quants)])

    def encode(self, values: Float32Array) -> UInt8Array:
        x = self.in_groups(values)[..., 0, :]
        scales = largest(x) / np.float32(UNEVEN[0])
        return self.packed(half(scales), *packed(nearest(x * inverse(scales), UNEVEN), 4))


class MXFP4(BlockFormat):
    """OCP's MXFP4: a byte of exponent, then 32 values of 4 bits (e2m1), packed as q4_0.

    The scale of E2M1's doubled values is 2^(byte - 128).
    """

    name, block_bytes = "mxfp4", 17

    def groups(self, raw: UInt8Array) -> Groups:
        exponents, quants = self.fields(raw, 1, 16)
        scales = np.ldexp(np.float32(1), exponents[..., 0].astype(np.int32) - 128)
        return Groups(scales, E2M1[unpacked(quants)])

    def encode(self, values: Float32Array) -> UInt8Array:
        x = self.in_groups(values)[..., 0, :]
        most = np.abs(x).max(axis=-1, keepdims=True)
        if not np.isfinite(most).all():
            raise UserError("values that are not finite do not fit mxfp4; use --dtype f32")
        with np.errstate(divide="ignore"):
            exponents = np.where(most > 0, np.floor(np.log2(most)) - 2 + 127, 0)
        exponents = np.clip(exponents, 0, 254)
        scaled = np.ldexp(x, 128 - exponents.astype(np.int32))
        size = nearest(np.abs(scaled), E2M1[:8])  # of two that are as near the smaller
        q = size + 8 * ((scaled < 0) & (size > 0))
        return self.packed(exponents.astype(np.uint8), *packed(q, 4))


def largest(x: Float32Array) -> Float32Array:
    """Of each row of x (..., n) the value that is largest in magnitude (..., 1), with its sign."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)


def inverse(scales: Float32Array) -> Float32Array:
    """1 / scales, and 0 of a scale of 0."""
    with np.errstate(divide="ignore"):
        return np.where(scales == 0, np.float32(0), np.float32(1) / scales)


def half(values: Float32Array) -> UInt8Array:
    """values (..., 1) -> the bytes (..., 2) of their float16. Raises UserError beyond 65504."""
    try:
        return HALF.encode(values)
    except UserError:
        raise UserError("a scale beyond 65504 does not fit; use --dtype bf16 or f32") from None


def nearest(values: Float32Array, table: Int8Array) -> UInt8Array:
    """The places (...) of the entries of an ascending table that are nearest to the values."""
    between = (table[1:].astype(np.float32) + table[:-1]) / 2
    return np.searchsorted(between, values).astype(np.uint8)


def unpacked(packed: UInt8Array) -> Int8Array:
    """(..., 16), or with fifth bits before them (..., 20) -> 32 whole numbers, not negative."""
    low = packed[..., -16:]
    q = np.concatenate([low & 15, low >> 4], axis=-1)
    if packed.shape[-1] == 20:
        q |= np.unpackbits(packed[..., :4], axis=-1, bitorder="little") << 4
    return q.view(np.int8)


def packed(q: AnyArray, bits: int) -> list[AnyArray]:
    """The reverse of ``unpacked``: the fields of q (..., 32)."""
    q = q.astype(np.uint8)
    low = (q[..., :16] & 15) | q[..., 16:] << 4
    return [np.packbits(q >> 4, axis=-1, bitorder="little"), low] if bits == 5 else [low]
