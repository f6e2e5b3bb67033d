"""A value in a few numbers: a digest, moments, extremes and a fixed sample."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float64Array, Int64Array
from flashinfer.oracle.trace_file import DIGEST, MOMENTS, SAMPLE, SUMMARIES, TraceWriter
from flashinfer.transformer.values import Value

GOLDEN = (math.sqrt(5) - 1) / 2


class Summary(NamedTuple):
    """Of one value.

    digest   of its bytes, little-endian: the first DIGEST digits of SHA-256
    moments  (6,) float64, as MOMENTS has them; mean, rms and extremes are those of finite elements
    sample   (SAMPLE,) float64: the elements at ``sampled(name, size)``
    """

    digest: str
    moments: Float64Array
    sample: Float64Array


def sampled(name: str, size: int) -> Int64Array:
    """Which elements of a flat array of ``size`` are kept: they depend on nothing but its name and
    size, and lie all over it."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little") / 2**48
    steps = (seed + GOLDEN * np.arange(SAMPLE)) % 1.0
    return np.minimum((steps * size).astype(np.int64), size - 1)


class Running:
    """The Summary of a value that comes some rows at a time, in order."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.hash, self.seen, self.count = hashlib.sha256(), 0, 0
        self.total, self.squares = 0.0, 0.0
        self.least, self.largest, self.nan, self.infinite = math.inf, -math.inf, 0, 0
        self.where = sampled(name, math.prod(shape))
        self.sample = np.zeros(SAMPLE)

    def add(self, rows: AnyArray) -> None:
        """Take the next rows (n, ...)."""
        rows = np.ascontiguousarray(rows)
        self.hash.update(rows.tobytes())
        flat = rows.reshape(-1).astype(np.float64)
        here = (self.where >= self.seen) & (self.where < self.seen + flat.size)
        self.sample[here] = flat[self.where[here] - self.seen]
        self.seen += flat.size
        # Row by row, so that sums do not depend on how many rows come at a time.
        for row in flat.reshape(len(rows), -1):
            self._add_row(row)

    def _add_row(self, row: Float64Array) -> None:
        finite = row[np.isfinite(row)]
        self.nan += int(np.isnan(row).sum())
        self.infinite += int(np.isinf(row).sum())
        self.count += finite.size
        if finite.size:
            self.total += float(finite.sum())
            self.squares += float((finite**2).sum())
            self.least = min(self.least, float(finite.min()))
            self.largest = max(self.largest, float(finite.max()))

    def summary(self) -> Summary:
        """The Summary of all rows."""
        n = max(1, self.count)
        moments = (
            self.total / n, math.sqrt(self.squares / n), self.least, self.largest, self.nan,
            self.infinite,
        )  # fmt: skip
        return Summary(self.hash.hexdigest()[:DIGEST], np.array(moments), self.sample)


def summary_of(name: str, array: AnyArray) -> Summary:
    """The Summary of a whole value (T, ...)."""
    running = Running(name, array.shape)
    running.add(array)
    return running.summary()


class Summaries:
    """A Sink that keeps a Summary of each value."""

    def __init__(self, values: Iterable[Value], n_rows: int) -> None:
        self.values, self.n_rows = list(values), n_rows
        self.running = {v.name: Running(v.name, (n_rows, *v.shape)) for v in self.values}

    def rows(self, value: Value, first: int, rows: AnyArray) -> None:
        """Take the next rows (n, ...) of a value."""
        self.running[value.name].add(rows)

    def write(self, path: Path | str, metadata: dict[str, str]) -> None:
        """Write the summaries as a trace. Raises UserError where the file cannot be written."""
        found = {value.name: self.running[value.name].summary() for value in self.values}
        listed = [
            [value.name, value.dtype, [self.n_rows, *value.shape], found[value.name].digest]
            for value in self.values
        ]
        n = len(found)
        moments = Value("moments", None, "moments", (len(MOMENTS),), "F64")
        sample = Value("sample", None, "sample", (SAMPLE,), "F64")
        metadata = {**metadata, SUMMARIES: json.dumps(listed, separators=(",", ":"))}
        with TraceWriter(path, [moments, sample], n, metadata) as writer:
            writer.rows(moments, 0, np.array([s.moments for s in found.values()]))
            writer.rows(sample, 0, np.array([s.sample for s in found.values()]))
