"""GGML's ternary formats: blocks of 256 values that are -1, 0 or 1 times one float16 scale.

BitNet b1.58 (Ma et al. 2024) and TriLMs have such weights.
"""

import numpy as np

from ..arrays import AnyArray, Float32Array, UInt8Array
from .base import BlockFormat, Groups
from .blocks import HALF, half, inverse
from .k_quants import from_planes, planes

POWERS = np.array([1, 3, 9, 27, 81], dtype=np.uint8)


class Ternary(BlockFormat):
    """value = scale * (q - 1), where q is 0, 1 or 2. The scale comes last."""

    block = 256

    def groups(self, raw: UInt8Array) -> Groups:
        packed, scale = self.fields(raw, self.block_bytes - 2, 2)
        quants = self.digits(packed).astype(np.int8) - np.int8(1)  # (..., blocks, 256)
        shape = (*raw.shape[:-1], 8 * scale.shape[-2])
        scales = np.broadcast_to(HALF.decode(scale), (*scale.shape[:-1], 8)).reshape(shape)
        return Groups(scales, quants.reshape(*shape, self.group))

    def encode(self, values: Float32Array) -> UInt8Array:
        x = self.in_groups(values)
        x = x.reshape(*x.shape[:-2], self.block)
        scale = np.abs(x).max(axis=-1, keepdims=True)
        scaled = x * inverse(scale)
        q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)) + 1  # half away from zero
        q = np.clip(np.where(np.isfinite(q), q, 1), 0, 2).astype(np.uint8)
        return self.packed(self.from_digits(q), half(scale))

    def digits(self, packed: UInt8Array) -> UInt8Array:
        """(..., blocks, bytes) -> q (..., blocks, 256)."""
        raise NotImplementedError

    def from_digits(self, q: UInt8Array) -> UInt8Array:
        """The reverse of ``digits``."""
        raise NotImplementedError


class TQ2_0(Ternary):
    """64 bytes of two bits each, which lie as those of q2_K."""

    name, block_bytes = "tq2_0", 66

    def digits(self, packed: UInt8Array) -> UInt8Array:
        return planes(packed, 2, 32).reshape(*packed.shape[:-1], self.block)

    def from_digits(self, q: UInt8Array) -> UInt8Array:
        return from_planes(q.reshape(*q.shape[:-1], 8, 32), 2)


class TQ1_0(Ternary):
    """48 bytes of five digits to the base 3 each, 4 of four.

    A byte is a number below 1, in 256ths and rounded up, and its digits are values. The first
    digits of 32 bytes are the first 32 values, their second digits the next 32; then the same of 16
    bytes, and of 4.
    """

    name, block_bytes = "tq1_0", 54
    runs = ((32, 5), (16, 5), (4, 4))  # (bytes, digits of each)

    def digits(self, packed: UInt8Array) -> UInt8Array:
        parts: list[AnyArray] = []
        for run, (n, digits) in zip(np.split(packed, (32, 48), axis=-1), self.runs, strict=True):
            left = run[..., None, :] * POWERS[:digits, None]  # modulo 256: the fraction
            found = left.astype(np.uint16) * 3 >> 8
            parts.append(found.reshape(*run.shape[:-1], n * digits))
        return np.concatenate(parts, axis=-1).astype(np.uint8)

    def from_digits(self, q: UInt8Array) -> UInt8Array:
        parts, at = [], 0
        for n, digits in self.runs:
            run = q[..., at : at + n * digits].reshape(*q.shape[:-1], digits, n)
            places = POWERS[4::-1][:digits, None].astype(np.uint16)
            parts.append(((run * places).sum(axis=-2, dtype=np.uint16) * 256 + 242) // 243)
            at += n * digits
        return np.concatenate(parts, axis=-1).astype(np.uint8)
