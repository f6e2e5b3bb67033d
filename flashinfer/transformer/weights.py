"""A matrix of weights, wherever it is: in DRAM, or streamed from flash at each use, or partly so.

All give the same bits: a product's elements do not depend on how its rows are grouped.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array, Int64Array, UInt8Array
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.paper.flash import Flash
from flashinfer.paper.interfaces import Stream
from flashinfer.paper.streamed import streamed_linear, streamed_tiles

FEW = 8  # tokens for which the heads' own products are computed together


class Resident:
    """Weights in DRAM: ``data`` (rows, row_bytes) uint8, as they lie in the file."""

    in_dram = True

    def __init__(self, tensor: StoredTensor, data: UInt8Array) -> None:
        self.matrix = kernels.Matrix(data, tensor.columns, tensor.format)

    def streams(self) -> tuple[Stream, ...]:
        """What of it is streamed at every token."""
        return ()

    def linear(
        self, x: Float32Array, bias: Float32Array | None = None, rounded: bool = False
    ) -> Float32Array:
        """x (T, columns) -> (T, rows) float32, as ``kernels.linear``."""
        return kernels.linear(x, self.matrix, bias, rounded)

    def parts(self) -> Iterator[tuple[int, kernels.Matrix]]:
        """Yield (the number of its first row, some rows), of all rows."""
        yield 0, self.matrix

    def some(self, x: Float32Array, ids: Int64Array, bias: Float32Array) -> Float32Array:
        """As ``linear``, of the rows ``ids`` alone; bias as they are -> (T, len(ids))."""
        starts = ids * np.int64(self.matrix.data.strides[0])
        memory, format = self.matrix.data.reshape(-1), self.matrix.format
        return kernels.sparse_up(memory, starts, format, x, bias).T

    def rows(self, ids: Int64Array) -> Float32Array:
        """Single rows as float32 (len(ids), columns)."""
        return self.matrix.format.decode(self.matrix.data[ids])


class Streamed:
    """Weights on flash, brought through ``buffer`` whenever they are needed.

    following  the StoredTensor that will be streamed next, as far as is known
    """

    in_dram = False

    def __init__(self, tensor: StoredTensor, flash: Flash, buffer: UInt8Array) -> None:
        self.tensor, self.flash, self.buffer = tensor, flash, buffer
        self.following: StoredTensor | None = None

    def streams(self) -> tuple[Stream, ...]:
        """What of it is streamed at every token."""
        return (self,)

    def linear(
        self, x: Float32Array, bias: Float32Array | None = None, rounded: bool = False
    ) -> Float32Array:
        """x (T, columns) -> (T, rows) float32, as ``kernels.linear``."""
        flash, buffer = self.flash, self.buffer
        return streamed_linear(flash, self.tensor, buffer, self.following, x, bias, rounded)

    def parts(self) -> Iterator[tuple[int, kernels.Matrix]]:
        """Yield (the number of its first row, some rows), of all rows, as they come."""
        return streamed_tiles(self.flash, self.tensor, self.buffer, self.following)

    def some(self, x: Float32Array, ids: Int64Array, bias: Float32Array) -> Float32Array:
        """As ``linear``, of the rows ``ids`` alone, though all are read."""
        return self.linear(x)[:, ids] + bias

    def rows(self, ids: Int64Array) -> Float32Array:
        """Single rows as float32 (len(ids), columns), each read on its own."""
        tensor = self.tensor
        distinct, where = np.unique(ids, return_inverse=True)
        out = np.empty((len(distinct), tensor.columns), dtype=np.float32)
        width = np.arange(tensor.row_bytes)
        for position, n, memory, starts in self.flash.read_rows(tensor, distinct, self.buffer):
            out[position : position + n] = tensor.format.decode(memory[starts[:, None] + width])
        return out[where]


class PartlyStreamed(Streamed):
    """The first rows in DRAM, as Resident's ``data``, the others on flash."""

    def __init__(
        self, tensor: StoredTensor, data: UInt8Array, flash: Flash, buffer: UInt8Array
    ) -> None:
        n, self.first = len(data), Resident(tensor, data)
        others = replace(tensor, offset=tensor.offset + n * tensor.row_bytes, rows=tensor.rows - n)
        super().__init__(others, flash, buffer)

    def linear(
        self, x: Float32Array, bias: Float32Array | None = None, rounded: bool = False
    ) -> Float32Array:
        """x (T, columns) -> (T, rows) float32, as ``kernels.linear``."""
        n = len(self.first.matrix.data)
        first, others = (None, None) if bias is None else (bias[:n], bias[n:])
        self.flash.begin(self.tensor, self.buffer)
        y = self.first.linear(x, first, rounded)
        return np.concatenate([y, super().linear(x, others, rounded)], axis=1)

    def parts(self) -> Iterator[tuple[int, kernels.Matrix]]:
        """Yield (the number of its first row, some rows), of all rows, as they come."""
        self.flash.begin(self.tensor, self.buffer)
        yield from self.first.parts()
        for first, matrix in super().parts():
            yield len(self.first.matrix.data) + first, matrix

    def rows(self, ids: Int64Array) -> Float32Array:
        """Single rows as float32 (len(ids), columns)."""
        n = len(self.first.matrix.data)
        out, there = np.empty((len(ids), self.tensor.columns), dtype=np.float32), ids < n
        out[there] = self.first.rows(ids[there])
        if not there.all():
            out[~there] = super().rows(ids[~there] - n)
        return out


Weights = Resident | Streamed


@dataclass
class Linear:
    """A linear layer: weights, and biases (rows,) float32 or None; rounded: see
    ``kernels.linear``."""

    weights: Weights
    bias: Float32Array | None = None
    rounded: bool = False

    def __call__(self, x: Float32Array) -> Float32Array:
        """x (T, columns) -> (T, rows) float32."""
        return self.weights.linear(x, self.bias, self.rounded)

    def streams(self) -> tuple[Stream, ...]:
        """What of it is streamed at every token."""
        return self.weights.streams()


@dataclass
class LinearOfHeads(Linear):
    """A linear layer of each head, in one matrix: each head's rows come behind those of the one
    before. Without biases.

    rows  of each head
    """

    rows: int = 1

    def __call__(self, x: Float32Array) -> Float32Array:
        """x (T, heads, columns) -> (T, heads, rows) float32."""
        n, heads, _ = x.shape
        out = np.empty((n, heads * self.rows), dtype=np.float32)
        for first, part in self.weights.parts():
            add = self._together if n <= FEW else self._one_by_one
            add(x, first, part, out[:, first : first + len(part.data)])
        return out.reshape(n, heads, self.rows)

    def _together(
        self, x: Float32Array, first: int, part: kernels.Matrix, out: Float32Array
    ) -> None:
        """out (T, rows of the part) = the rows from the ``first`` on, each of its own head; in one
        call, because threads that wake for every head would cost more than they compute."""
        n, heads, columns = x.shape
        rows = np.arange(len(part.data))
        head = (first + rows) // self.rows
        pairs = head[:, None] + heads * np.arange(n)  # (rows, T) of T * heads
        y = kernels.sparse_up(
            part.data.reshape(-1), rows * part.data.shape[1], part.format,
            np.ascontiguousarray(x).reshape(n * heads, columns), None,
            n * np.arange(len(rows) + 1, dtype=np.int32),
            pairs.astype(np.int32).reshape(-1),
        )  # fmt: skip
        out[:] = y.reshape(len(rows), n).T

    def _one_by_one(
        self, x: Float32Array, first: int, part: kernels.Matrix, out: Float32Array
    ) -> None:
        """The same head by head, in tiles of many tokens."""
        at, end = first, first + len(part.data)
        while at < end:  # a part may end within a head
            head, row = divmod(at, self.rows)
            stop = min(end, at + self.rows - row)
            own = replace(part, data=part.data[at - first : stop - first])
            out[:, at - first : stop - first] = kernels.linear(
                np.ascontiguousarray(x[:, head]), own
            )
            at = stop
