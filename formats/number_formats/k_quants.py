"""GGML's K-quants and iq4_xs: blocks of 256 values in groups of 16 or 32.

Each group has a scale of a few bits, and some formats a minimum, too; a float16 of the block
multiplies all of its scales, another all of its minima. GGML's encoder searches for the scales that
round best; the one here takes those that reach the group's largest value.
"""

import numpy as np

from ..arrays import AnyArray, Float32Array, Int8Array, UInt8Array
from .base import BlockFormat, Groups
from .blocks import HALF, UNEVEN, half, inverse, largest, nearest, unpacked

MOST_6_BITS = 63


class KQuant(BlockFormat):
    """value = (scale of the block * scale of the group) * q, and less its minimum, made alike."""

    block = 256

    def made(
        self,
        scale: UInt8Array,
        scales: AnyArray,
        quants: AnyArray,
        least: UInt8Array | None = None,
        minima: AnyArray | None = None,
    ) -> Groups:
        """The Groups of fields: scale, least (..., blocks, 2) are float16, scales, minima (...,
        blocks, groups) and quants (..., blocks, groups, values of each) whole numbers."""
        shape = (*scale.shape[:-2], scales.shape[-2] * scales.shape[-1])
        whole = quants.reshape(*shape, self.group)
        products = self._product(scale, scales).reshape(shape)
        if least is None or minima is None:
            return Groups(products, whole)
        return Groups(products, whole, self._product(least, minima).reshape(shape))

    def _product(self, scale: UInt8Array, scales: AnyArray) -> Float32Array:
        with np.errstate(invalid="ignore"):
            product: Float32Array = HALF.decode(scale) * scales.astype(np.float32)
        return product


class Symmetric(KQuant):
    """Values around zero: whole numbers from -``zero`` on, whose scales are within ``scales``."""

    zero, scales = 32, (-128, 127)

    def rounded(self, values: Float32Array) -> tuple[UInt8Array, Int8Array, AnyArray]:
        """values (..., columns) -> (the blocks' scales, those of groups, quants), see ``made``."""
        x, (low, high) = self.in_groups(values), self.scales
        exact = (largest(x) / np.float32(-self.zero))[..., 0]  # (..., blocks, groups)
        scale = half(largest(exact) / np.float32(low))
        one = HALF.decode(scale)
        scales = np.clip(np.rint(exact * inverse(one)), low, high)
        q = np.rint(x * inverse((one * scales).astype(np.float32))[..., None])
        q = np.clip(q, -self.zero, self.zero - 1).astype(np.int8)
        return scale, scales.astype(np.int8), q


class Shifted(KQuant):
    """Values above a minimum: whole numbers up to ``most``, whose scales and minima are up to
    ``most_scale``."""

    most, most_scale = 15, MOST_6_BITS

    def rounded(
        self, values: Float32Array
    ) -> tuple[UInt8Array, UInt8Array, UInt8Array, UInt8Array, UInt8Array]:
        """values (..., columns) -> (the blocks' scales, those of groups, the minima's, those of
        groups, quants), see ``made``."""
        x = self.in_groups(values)
        low = np.minimum(x.min(axis=-1), 0)  # (..., blocks, groups)
        scale, scales = self._whole((x.max(axis=-1) - low) / np.float32(self.most))
        least, minima = self._whole(-low)
        each = HALF.decode(scale) * scales
        q = np.rint((x + (HALF.decode(least) * minima)[..., None]) * inverse(each)[..., None])
        return scale, scales, least, minima, np.clip(q, 0, self.most).astype(np.uint8)

    def _whole(self, exact: Float32Array) -> tuple[UInt8Array, UInt8Array]:
        """exact (..., blocks, groups), not negative -> (a float16 (..., 2), whole numbers)."""
        scale = half(exact.max(axis=-1, keepdims=True) / np.float32(self.most_scale))
        whole = np.rint(exact * inverse(HALF.decode(scale)))
        return scale, np.clip(whole, 0, self.most_scale).astype(np.uint8)


class Q2_K(Shifted):
    """16 bytes of scales (low half) and minima, 64 of quants, the two float16."""

    name, block_bytes, group = "q2_K", 84, 16
    most, most_scale = 3, 15

    def groups(self, raw: UInt8Array) -> Groups:
        scales, quants, scale, least = self.fields(raw, 16, 64, 2, 2)
        return self.made(scale, scales & 15, planes(quants, 2, 16), least, scales >> 4)

    def encode(self, values: Float32Array) -> UInt8Array:
        scale, scales, least, minima, q = self.rounded(values)
        return self.packed(scales | minima << 4, from_planes(q, 2), scale, least)


class Q3_K(Symmetric):
    """32 bytes of the quants' third bits, 64 of their low ones, 12 of scales, the float16.

    A third bit that is not set takes 4 from the value.
    """

    name, block_bytes, group = "q3_K", 110, 16
    zero, scales = 4, (-32, 31)

    def groups(self, raw: UInt8Array) -> Groups:
        high, low, packed, scale = self.fields(raw, 32, 64, 12, 2)
        q = planes(low, 2, 16).view(np.int8) - 4 + 4 * planes(high, 1, 16).view(np.int8)
        nibbles = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
        twos = np.concatenate([packed[..., 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
        return self.made(scale, (nibbles | twos << 4).view(np.int8) - np.int8(32), q)

    def encode(self, values: Float32Array) -> UInt8Array:
        scale, scales, q = self.rounded(values)
        whole, s = (q + np.int8(4)).view(np.uint8), (scales + np.int8(32)).view(np.uint8)
        packed = [(s[..., :8] & 15) | (s[..., 8:] & 15) << 4]
        packed.append(sum((s[..., 4 * i : 4 * i + 4] >> 4) << 2 * i for i in range(4)))
        return self.packed(from_planes(whole >> 2, 1), from_planes(whole & 3, 2), *packed, scale)


class Q4_K(Shifted):
    """The two float16, 12 bytes of scales and minima, 128 of quants: of each two groups the
    first's are the low halves of 32 bytes."""

    name, block_bytes = "q4_K", 144

    def groups(self, raw: UInt8Array) -> Groups:
        scale, least, packed, quants = self.fields(raw, 2, 2, 12, 128)
        scales, minima = six_bits(packed)
        return self.made(scale, scales, planes(quants, 4, 32), least, minima)

    def encode(self, values: Float32Array) -> UInt8Array:
        scale, scales, least, minima, q = self.rounded(values)
        return self.packed(scale, least, from_six_bits(scales, minima), from_planes(q, 4))


class Q5_K(Shifted):
    """As Q4_K, with 32 bytes of fifth bits before the quants: bit i is of group i."""

    name, block_bytes, most = "q5_K", 176, 31

    def groups(self, raw: UInt8Array) -> Groups:
        scale, least, packed, fifths, quants = self.fields(raw, 2, 2, 12, 32, 128)
        scales, minima = six_bits(packed)
        q = planes(quants, 4, 32) | planes(fifths, 1, 32) << 4
        return self.made(scale, scales, q, least, minima)

    def encode(self, values: Float32Array) -> UInt8Array:
        scale, scales, least, minima, q = self.rounded(values)
        packed, low = from_six_bits(scales, minima), from_planes(q & 15, 4)
        return self.packed(scale, least, packed, from_planes(q >> 4, 1), low)


class Q6_K(Symmetric):
    """128 bytes of low halves, 64 of the two bits above them, 16 int8 of scales, the float16.

    64 bytes are the low halves of 64 values, and their high halves those of the 64 that follow.
    """

    name, block_bytes, group = "q6_K", 210, 16

    def groups(self, raw: UInt8Array) -> Groups:
        low, high, scales, scale = self.fields(raw, 128, 64, 16, 2)
        q = planes(low, 4, 16, 64) | planes(high, 2, 16) << 4
        return self.made(scale, scales.view(np.int8), q.view(np.int8) - np.int8(32))

    def encode(self, values: Float32Array) -> UInt8Array:
        scale, scales, q = self.rounded(values)
        whole = (q + np.int8(32)).view(np.uint8)
        low, high = from_planes(whole & 15, 4, 64), from_planes(whole >> 4, 2)
        return self.packed(low, high, scales.view(np.uint8), scale)


class IQ4_XS(KQuant):
    """The float16, 2 bytes of the scales' high two bits, 4 of their low halves, 128 of quants,
    which are packed and stand for numbers as in iq4_nl."""

    name, block_bytes = "iq4_xs", 136

    def groups(self, raw: UInt8Array) -> Groups:
        scale, high, low, quants = self.fields(raw, 2, 2, 4, 128)
        lows = np.stack([low & 15, low >> 4], axis=-1).reshape(*low.shape[:-1], 8)
        highs = high.view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
        scales = (lows | highs.astype(np.uint8) << 4).view(np.int8) - np.int8(32)
        q = unpacked(quants.reshape(*quants.shape[:-1], 8, 16))
        return self.made(scale, scales, UNEVEN[q])

    def encode(self, values: Float32Array) -> UInt8Array:
        x = self.in_groups(values)
        exact = (largest(x) / np.float32(UNEVEN[0]))[..., 0]
        scale = half(largest(exact) / np.float32(-32))
        scales = np.clip(np.rint(exact * inverse(HALF.decode(scale))), -32, 31)
        each = (HALF.decode(scale) * scales).astype(np.float32)
        q = nearest(x * inverse(each)[..., None], UNEVEN)
        s = (scales + 32).astype(np.uint8)
        highs = (s >> 4).astype("<u2") << np.arange(0, 16, 2, dtype=np.uint16)
        high = highs.sum(axis=-1, keepdims=True, dtype="<u2").view(np.uint8)
        low = (q[..., :16] | q[..., 16:] << 4).reshape(*s.shape[:-1], 128)
        return self.packed(scale, high, (s[..., ::2] & 15) | s[..., 1::2] << 4, low)


def planes(packed: UInt8Array, bits: int, group: int, run: int = 32) -> UInt8Array:
    """Whole numbers of ``bits`` bits out of (..., bytes) -> (..., groups, ``group``).

    ``run`` bytes hold one value of each number of bits after the other: their lowest bits are those
    of the first ``run`` values, the next bits those of the next.
    """
    runs = packed.reshape(*packed.shape[:-1], packed.shape[-1] // run, 1, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    q = runs >> shifts & np.uint8((1 << bits) - 1)
    return q.reshape(*packed.shape[:-1], 8 // bits * packed.shape[-1] // group, group)


def from_planes(q: AnyArray, bits: int, run: int = 32) -> UInt8Array:
    """The reverse of ``planes``: q (..., groups, group) -> (..., bytes)."""
    n = q.shape[-2] * q.shape[-1] * bits // 8 // run
    runs = q.astype(np.uint8).reshape(*q.shape[:-2], n, 8 // bits, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    packed: UInt8Array = np.bitwise_or.reduce(runs << shifts, axis=-2)
    return packed.reshape(*q.shape[:-2], n * run)


def six_bits(packed: UInt8Array) -> tuple[UInt8Array, UInt8Array]:
    """(scales, minima) (..., 8) of 6 bits out of (..., 12): the first four of each are the low bits
    of bytes 0 to 3 and 4 to 7; of the others the low halves are in bytes 8 to 11 and the high two
    bits in the high bits of those."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = [first & 63, (third & 15) | (first >> 6) << 4]
    minima = [second & 63, third >> 4 | (second >> 6) << 4]
    return np.concatenate(scales, axis=-1), np.concatenate(minima, axis=-1)


def from_six_bits(scales: UInt8Array, minima: UInt8Array) -> UInt8Array:
    """The reverse of ``six_bits``: (..., 8) each -> (..., 12)."""
    parts = [
        scales[..., :4] | (scales[..., 4:] >> 4) << 6,
        minima[..., :4] | (minima[..., 4:] >> 4) << 6,
        (scales[..., 4:] & 15) | (minima[..., 4:] & 15) << 4,
    ]
    return np.concatenate(parts, axis=-1)
