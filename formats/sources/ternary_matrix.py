"""A BitNet's matrix as a checkpoint's shards hold it: packed, or as floats, beside its scale."""

from collections.abc import Iterator

import numpy as np

from ..arrays import Float32Array
from ..bitnet import PACKED, BitNet, ternary, unpacked
from .shards import COLUMN_CHUNK, Shard

BYTES = ("U8", "torch.uint8")  # what the kinds of shards call them
TOGETHER = 4 << 20  # weights whose magnitudes are added at a time


def in_a_layer(name: str) -> bool:
    """Whether a checkpoint's tensor is one of its layers', whose matrices are linear layers."""
    return ".layers." in f".{name}"


class TernaryMatrix:
    """The weights of one linear layer, or its biases where these are scaled with them.

    stored  how the checkpoint has its matrices
    place   (the shard, the tensor's name in it); scale: those of its scale, or None
    shape   (rows, columns) of the weights, or (rows,)
    """

    def __init__(
        self, stored: BitNet, place: tuple[Shard, str], scale: tuple[Shard, str] | None
    ) -> None:
        self.stored, self.scale = stored, scale
        self.shard, self.name = place
        rows, *columns = self.shard.shapes()[self.name]
        self.packed = bool(columns) and self.shard.dtype(self.name) in BYTES
        self.shape: tuple[int, ...] = (PACKED * rows if self.packed else rows, *columns)
        self.mean: float | None = None

    @property
    def shards(self) -> list[Shard]:
        """Those that it is read from."""
        return [self.shard] if self.scale is None else [self.shard, self.scale[0]]

    def read_rows(self, start: int = 0, stop: int | None = None) -> Float32Array:
        """Rows ``start:stop`` as float32; see SafetensorsFile."""
        if not self.packed:
            return self._scaled(self.shard.read_rows(self.name, start, stop))
        rows = self.shape[0]
        stop, height = rows if stop is None else min(stop, rows), rows // PACKED
        parts = [np.empty((0, self.shape[1]), dtype=np.float32)]
        for quarter in range(PACKED):
            begin, end = (min(max(row - quarter * height, 0), height) for row in (start, stop))
            if begin < end:
                parts.append(unpacked(self.shard.read_bytes(self.name, begin, end), quarter))
        return self._scaled(np.concatenate(parts))

    def read_columns(self) -> Iterator[Float32Array]:
        """Yield the matrix transposed, in pieces (<= COLUMN_CHUNK, rows) float32."""
        if not self.packed:
            for piece in self.shard.read_columns(self.name):
                yield self._scaled(piece)
            return
        packed = self.shard.read_bytes(self.name, 0, self.shape[0] // PACKED)
        for start in range(0, packed.shape[1], COLUMN_CHUNK):
            some = packed[:, start : start + COLUMN_CHUNK]
            quarters = [unpacked(some, quarter) for quarter in range(PACKED)]
            yield self._scaled(np.concatenate(quarters)).T

    def _scaled(self, values: Float32Array) -> Float32Array:
        """Weights, of what is stored of them."""
        if self.scale is None:
            return ternary(values, self._mean_magnitude())
        shard, name = self.scale
        return values * self.stored.factor(shard.read_rows(name).reshape(1))

    def _mean_magnitude(self) -> float:
        """Of all that is stored, which is read once for it."""
        if self.mean is None:
            rows, columns = self.shape
            step, total = max(1, TOGETHER // max(1, columns)), 0.0
            for first in range(0, rows, step):
                some = self.shard.read_rows(self.name, first, min(rows, first + step))
                total += float(np.abs(some).sum(dtype=np.float64))
            self.mean = total / max(1, rows * columns)
        return self.mean
