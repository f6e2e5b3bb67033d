"""Where a bundle's tensors lie."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..arrays import Int32Array, Int64Array
from ..number_formats import NumberFormat
from .in_place import Run

PAGE = 4096


class Span(NamedTuple):
    """A range of a file, in bytes."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of weights in a bundle: rows of ``row_bytes`` bytes, beginning at ``offset``.

    offset  an address, see in_place.py
    places  (rows,) int32: the place of each row in the file, in rows from ``offset``; None: rows
            lie in their own order
    runs    of units whose matrices lie apart a Run for each of them; the first one begins at
            ``offset``
    """

    name: str
    offset: int
    rows: int
    columns: int
    format: NumberFormat
    places: Int32Array | None = field(default=None, compare=False, repr=False)
    runs: tuple[Run, ...] | None = None

    @property
    def row_bytes(self) -> int:
        return self.format.row_bytes(self.columns)

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def pages_of(self, rows: int) -> Span:
        """The pages on which the first rows lie: a tensor of another file may begin within one."""
        begin = self.offset // PAGE * PAGE
        end = -(-(self.offset + rows * self.row_bytes) // PAGE) * PAGE
        return Span(begin, end - begin)

    def place(self, rows: Int64Array) -> Int64Array:
        """The places of rows (n,) int64 in the file, (n,) int64."""
        return rows if self.places is None else self.places[rows].astype(np.int64)

    def order(self) -> Int64Array:
        """The row that lies at each place of the file, (rows,) int64."""
        return np.arange(self.rows) if self.places is None else np.argsort(self.places)
