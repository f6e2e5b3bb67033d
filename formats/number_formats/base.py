"""What a number format is: how a row of weights lies in bytes, and its float32 values."""

from typing import NamedTuple

import numpy as np

from ..arrays import AnyArray, Float32Array, Int8Array, UInt8Array
from ..errors import UserError


class NumberFormat:
    """One way to write a row of numbers: a run of blocks.

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
        """values (..., columns) float32 -> (..., row_bytes) uint8, rounded to the nearest."""
        raise NotImplementedError


class Groups(NamedTuple):
    """Rows as groups of whole numbers that share a scale: value = scale * q - minimum.

    scales  (..., n) float32; quants (..., n, values of each) int8
    minima  (..., n) float32; None: there are none
    """

    scales: Float32Array
    quants: Int8Array
    minima: Float32Array | None = None


class BlockFormat(NumberFormat):
    """GGML's blocks, whose bytes hold Groups of ``group`` values, 16 or 32."""

    safetensors, block, group = "U8", 32, 32

    def groups(self, raw: UInt8Array) -> Groups:
        """raw (..., row_bytes) -> its Groups, of which a row has columns / ``group``."""
        raise NotImplementedError

    def decode(self, raw: UInt8Array) -> Float32Array:
        scales, quants, minima = self.groups(raw)
        with np.errstate(over="ignore", invalid="ignore"):  # scales may be anything
            values = quants * scales[..., None]
            if minima is not None:
                values -= minima[..., None]
        return values.reshape(*raw.shape[:-1], quants.shape[-2] * self.group)

    def fields(self, raw: UInt8Array, *sizes: int) -> list[UInt8Array]:
        """raw (..., row_bytes) -> [(..., blocks, size) of each field], whose sizes make a block."""
        n = raw.shape[-1] // self.block_bytes
        blocks = np.ascontiguousarray(raw).reshape(*raw.shape[:-1], n, self.block_bytes)
        return [field.copy() for field in np.split(blocks, np.cumsum(sizes)[:-1], axis=-1)]

    def in_groups(self, values: Float32Array) -> Float32Array:
        """values (..., columns) -> (..., blocks, groups of each, values of each)."""
        shape = values.shape[-1] // self.block, self.block // self.group, self.group
        return np.asarray(values, dtype=np.float32).reshape(*values.shape[:-1], *shape)

    def packed(self, *fields: AnyArray) -> UInt8Array:
        """The reverse of ``fields``: (..., blocks, size) each -> (..., row_bytes)."""
        raw: UInt8Array = np.ascontiguousarray(np.concatenate(fields, axis=-1))
        return raw.reshape(*raw.shape[:-2], raw.shape[-2] * self.block_bytes)
