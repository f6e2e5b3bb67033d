"""Tracing our own engine: every intermediate value of a run, to a file or to memory."""

import fnmatch
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from flashinfer import __version__
from flashinfer.formats.architectures import architecture
from flashinfer.formats.arrays import AnyArray, Int64Array
from flashinfer.formats.errors import UserError
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.model import Model
from flashinfer.oracle.summary import Summaries
from flashinfer.oracle.trace_file import TraceWriter, trace_metadata
from flashinfer.paper.interfaces import Columns
from flashinfer.transformer.values import Value, values_of

# Our engine adds experts to what the shared expert gave, and divides by a norm of activations what
# the down projection makes of them.
NOT_TOLD = ("experts", "activations_norm")


class Sink(Protocol):
    """Takes the rows of values: TraceWriter, Summaries or Collected."""

    def rows(self, value: Value, first: int, rows: AnyArray) -> None:
        """Take ``rows`` (n, ...) of a value, those from the row ``first`` on."""


class Collected:
    """A Sink in memory: ``arrays`` {name: (T, ...)}."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.arrays: dict[str, AnyArray] = {}

    def rows(self, value: Value, first: int, rows: AnyArray) -> None:
        """Take ``rows`` (n, ...) of a value, those from the row ``first`` on."""
        if value.name not in self.arrays:
            self.arrays[value.name] = np.zeros((self.n_tokens, *value.shape), dtype=rows.dtype)
        self.arrays[value.name][first : first + len(rows)] = rows


class Recorder:
    """A TraceTap that gives a Sink the values asked for, at the positions asked for.

    values     the Values that are wanted
    positions  (n,) ascending: the tokens that are wanted
    """

    def __init__(self, values: Iterable[Value], positions: Int64Array, sink: Sink) -> None:
        self.values = {(value.layer, value.key): value for value in values}
        self.positions, self.sink = positions, sink
        self.gathered: dict[str, AnyArray] = {}

    def __call__(self, layer: int | None, first: int, **values: AnyArray | Columns) -> None:
        """Take values of a layer, or of the whole model, of the tokens from ``first`` on."""
        for key, found in values.items():
            if isinstance(found, Columns):
                self._gather(key, layer, found)
                continue
            if key == "ffn":
                self._gathered(layer, first)
            self._give(key, layer, first, found)

    def _give(self, key: str, layer: int | None, first: int, rows: AnyArray) -> None:
        value = self.values.get((layer, key))
        if value is None:
            return
        if value.dtype == "U8":
            rows = np.packbits(rows != 0, axis=1, bitorder="little")
        begin, end = np.searchsorted(self.positions, (first, first + len(rows)))
        if begin < end:
            rows = rows[self.positions[begin:end] - first]
            self.sink.rows(value, int(begin), rows.reshape(end - begin, *value.shape))

    def _gather(self, key: str, layer: int | None, found: Columns) -> None:
        value = self.values.get((layer, key)) or self.values.get((layer, "active"))
        if value is None:
            return
        if key not in self.gathered:
            width = value.shape[0] if value.key == key else 8 * value.shape[0]
            self.gathered[key] = np.zeros((len(found.values), width), dtype=np.float32)
        self.gathered[key][:, found.ids] = found.values

    def _gathered(self, layer: int | None, first: int) -> None:
        """Give what was gathered of a layer, now that its FFN is done."""
        for key, rows in self.gathered.items():
            self._give(key, layer, first, rows)
            if key == "activations":
                self._give("active", layer, first, rows)
        self.gathered = {}


def trace(
    model: Model,
    token_ids: Sequence[int],
    path: Path | str | None = None,
    only: Sequence[str] = (),
    positions: Sequence[int] | None = None,
    summary: bool = False,
    progress: Progress = no_progress,
) -> dict[str, AnyArray]:
    """Run ``token_ids`` from an empty context and write every intermediate value to ``path``.

    path       a safetensors file, see docs/traces.md; None: {name: (T, ...)} is returned instead
    only       patterns (fnmatch) of the names that are wanted; (): all
    positions  which tokens are wanted; None: all
    summary    write a summary of each value and not the value; memory and file stay small
    progress   is told the tokens done, as "trace"
    Raises UserError where nothing is wanted, an id is not in the vocabulary, or the text is longer
    than the context.
    """
    model.reset()
    ids = model.checked(token_ids)
    values = wanted_values(model, only)
    rows = _checked_positions(positions, len(ids))
    metadata = trace_metadata(
        f"flashinfer {__version__}", model.bundle.hf_config, ids, rows, model.plan.mode,
        "float32" if model.plan.kv_dtype == "f32" else f"float32-{model.plan.kv_dtype}-cache",
        model.plan.context,
    )  # fmt: skip
    if path is None:
        collected = Collected(len(rows))
        model.trace(ids, Recorder(values, rows, collected), progress)
        return collected.arrays
    if summary:
        summaries = Summaries(values, len(rows))
        model.trace(ids, Recorder(values, rows, summaries), progress)
        summaries.write(path, metadata)
        return {}
    with TraceWriter(path, values, len(rows), metadata) as writer:
        model.trace(ids, Recorder(values, rows, writer), progress)
    return {}


def wanted_values(model: Model, only: Sequence[str] = ()) -> list[Value]:
    """The Values that a trace of ``model`` has, whose names match a pattern of ``only``.

    Raises UserError where a pattern matches none.
    """
    # Of a neuron that is not predicted to fire neither gate nor up is computed.
    not_told = {*NOT_TOLD, *(("gate", "up") if model.plan.mode == "predicted" else ("predicted",))}
    every = values_of(model.config, architecture(model.bundle.hf_config))
    values = [value for value in every if value.key not in not_told]
    for pattern in only:
        if not fnmatch.filter([value.name for value in values], pattern):
            raise UserError(f"--only {pattern}: no value has such a name; {values[1].name} is one")
    if not only:
        return values
    return [v for v in values if any(fnmatch.fnmatchcase(v.name, p) for p in only)]


def _checked_positions(positions: Sequence[int] | None, n_tokens: int) -> Int64Array:
    if positions is None:
        return np.arange(n_tokens)
    rows = np.unique(np.asarray(positions, dtype=np.int64))
    if not rows.size or rows[0] < 0 or rows[-1] >= n_tokens:
        raise UserError(f"--positions: the text has positions 0 to {n_tokens - 1}")
    return rows
