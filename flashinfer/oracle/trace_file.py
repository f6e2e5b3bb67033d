"""The file of a trace: a safetensors file of a run's values, or of their summaries.

docs/traces.md describes it for those who write one by other means.
"""

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.formats.arrays import AnyArray, Int64Array
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.files import replacing
from flashinfer.formats.safetensors import ITEM_BYTES
from flashinfer.transformer.values import Value

VERSION = "1"
MARK, ENGINE, CONFIG = "flashinfer.trace", "flashinfer.engine", "flashinfer.config"
TOKENS, POSITIONS, ORDER = "flashinfer.tokens", "flashinfer.positions", "flashinfer.order"
MODE, SUMMARIES = "flashinfer.mode", "flashinfer.summaries"
NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.uint8, "U16": np.uint16,
    "U32": np.uint32,
}  # fmt: skip
MOST_VALUE = 8 << 30  # bytes of one value that are read at a time


def trace_metadata(
    engine: str, config: JsonObject, tokens: Int64Array, positions: Int64Array, mode: str = "dense"
) -> dict[str, str]:
    """What a trace says of its run.

    engine     what computed it, with its version; config: the model's, as Hugging Face has it
    positions  the tokens whose values it holds; mode: which neurons were used
    """
    return {
        MARK: VERSION,
        ENGINE: engine,
        MODE: mode,
        TOKENS: _compact(tokens.tolist()),
        POSITIONS: _compact(positions.tolist()),
        CONFIG: _compact(config),
    }


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


class TraceWriter:
    """Writes a trace whose values come in any order, some rows at a time.

    n_rows  rows of every value: the tokens whose values are written
    The file appears whole at the end of the ``with``, or not at all. Raises UserError.
    """

    def __init__(
        self, path: Path | str, values: Iterable[Value], n_rows: int, metadata: dict[str, str]
    ) -> None:
        self.offsets: dict[str, int] = {}
        order, at = [], 0
        header: dict[str, Any] = {"__metadata__": metadata}
        for value in values:
            size = n_rows * prod(value.shape) * ITEM_BYTES[value.dtype]
            header[value.name] = {
                "dtype": value.dtype,
                "shape": [n_rows, *value.shape],
                "data_offsets": [at, at + size],
            }
            self.offsets[value.name] = at
            order.append(value.name)
            at += size
        header["__metadata__"] = {**metadata, ORDER: _compact(order)}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.begin, self.header = 8 + len(text), text
        self.size = self.begin + at
        self._file = replacing(path, self.size)

    def __enter__(self) -> "TraceWriter":
        self.file = self._file.__enter__()
        self.file.write(len(self.header).to_bytes(8, "little") + self.header)
        self.file.truncate(self.size)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.__exit__(*exception)

    def rows(self, value: Value, first: int, rows: AnyArray) -> None:
        """Write ``rows`` (n, ...) of a value, those from the row ``first`` on."""
        rows = np.ascontiguousarray(rows, dtype=NUMPY[value.dtype])
        each = prod(value.shape) * rows.itemsize
        self.file.seek(self.begin + self.offsets[value.name] + first * each)
        self.file.write(rows.tobytes())
