"""Several matrices side by side in one row, each in a number format of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import Float32Array, UInt8Array
from .base import NumberFormat

PAGE = 4096


@dataclass(frozen=True)
class Part:
    """A matrix (rows, columns) in a NumberFormat; at: bytes before it."""

    rows: int
    columns: int
    format: NumberFormat
    at: int

    @property
    def row_bytes(self) -> int:
        return self.format.row_bytes(self.columns)

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


class Matrices(NumberFormat):
    """A row of matrices, which is what a unit that is always used whole has: [gate | up | down] or
    [up | down], as the model's source had them. Rows begin on pages, unless the matrices lie apart.

    parts  {"gate", "up", "down": Part}, in their order
    """

    safetensors = "U8"

    def __init__(
        self,
        shapes: dict[str, tuple[int, int]],
        formats: Sequence[NumberFormat],
        apart: bool = False,
    ) -> None:
        """shapes {part: (rows, columns)}. Raises UserError where blocks do not divide a row."""
        self.name = ",".join(format.name for format in formats)
        self.parts: dict[str, Part] = {}
        at = 0
        for (part, (rows, columns)), format in zip(shapes.items(), formats, strict=True):
            self.parts[part] = Part(rows, columns, format, at)
            at += self.parts[part].nbytes
        self.block, self.block_bytes = 1, at if apart else -(-at // PAGE) * PAGE
        self.columns = sum(part.rows * part.columns for part in self.parts.values())

    def row_bytes(self, columns: int) -> int:
        return self.block_bytes

    def decode(self, raw: UInt8Array) -> Float32Array:
        """raw (..., row_bytes) uint8 -> (..., values of all matrices, one after the other)."""
        found = []
        for part in self.parts.values():
            rows = raw[..., part.at : part.at + part.nbytes]
            rows = rows.reshape(*raw.shape[:-1], part.rows, part.row_bytes)
            found.append(part.format.decode(rows).reshape(*raw.shape[:-1], -1))
        return np.concatenate(found, axis=-1)
