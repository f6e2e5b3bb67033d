"""The file of a trace: a safetensors file of a run's values, or of their summaries.

docs/traces.md describes it for those who write one by other means.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.formats import bounded_json
from flashinfer.formats.arrays import AnyArray, Float64Array, Int64Array
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.errors import FormatError, printable, shown
from flashinfer.formats.files import replacing
from flashinfer.formats.numbers import is_whole
from flashinfer.formats.safetensors import ITEM_BYTES, SafetensorsFile
from flashinfer.formats.sources.gguf import is_gguf
from flashinfer.oracle.arithmetic import Arithmetic, arithmetic_named
from flashinfer.transformer.values import Value

VERSION = "1"
MARK, ENGINE, CONFIG = "flashinfer.trace", "flashinfer.engine", "flashinfer.config"
TOKENS, POSITIONS, ORDER = "flashinfer.tokens", "flashinfer.positions", "flashinfer.order"
MODE, SUMMARIES = "flashinfer.mode", "flashinfer.summaries"
ARITHMETIC, CONTEXT = "flashinfer.arithmetic", "flashinfer.context"
KEYS = (MARK, ENGINE, CONFIG, TOKENS, POSITIONS, ORDER, MODE, SUMMARIES, ARITHMETIC, CONTEXT)
NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.uint8, "U16": np.uint16,
    "U32": np.uint32,
}  # fmt: skip
DIGEST = 16  # hexadecimal digits of SHA-256
SAMPLE = 16  # elements of each value that a summary keeps
NOISE = "noise"  # the tensor that makes summaries a golden
MOMENTS = ("mean", "rms", "least", "largest", "nan", "infinite")
MOST_TOKENS = 1 << 31  # more than any text has, and any vocabulary
MOST_VALUE = 8 << 30  # bytes of one value that are read at a time


def trace_metadata(
    engine: str,
    config: JsonObject,
    tokens: Int64Array,
    positions: Int64Array,
    mode: str = "dense",
    arithmetic: str = "float32",
    context: int | None = None,
) -> dict[str, str]:
    """What a trace says of its run.

    engine     what computed it, with its version; config: the model's, as Hugging Face has it
    positions  the tokens whose values it holds; mode: which neurons were used
    arithmetic  how the engine rounds: a name of arithmetic.KNOWN
    context    tokens that the engine had room for; None: as many as there are
    """
    return {
        MARK: VERSION,
        ENGINE: engine,
        MODE: mode,
        TOKENS: _compact(tokens.tolist()),
        POSITIONS: _compact(positions.tolist()),
        CONFIG: _compact(config),
        ARITHMETIC: arithmetic,
        CONTEXT: str(context or len(tokens)),
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
        with np.errstate(over="ignore", invalid="ignore"):  # float64 may be beyond float32
            rows = np.ascontiguousarray(rows, dtype=NUMPY[value.dtype])
        each = prod(value.shape) * rows.itemsize
        self.file.seek(self.begin + self.offsets[value.name] + first * each)
        self.file.write(rows.tobytes())


class Trace:
    """A trace to be read. Everything in it is untrusted.

    engine     what computed it; mode: which neurons were used
    tokens     (N,): ids of the whole text
    arithmetic  how the engine says that it rounds; context: tokens that it had room for
    positions  (T,) ascending: those of the tokens whose values it holds
    names      of its values, in the order in which they were computed
    summaries  {name: (shape, digest)} where it holds summaries of the values; else None
    Raises FormatError where the file is not a sound trace.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.file = SafetensorsFile(path)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        metadata = self.file.metadata
        if metadata.get(MARK) != VERSION:
            found = metadata.get(MARK)
            what = "is not a trace" if found is None else f"is a trace of version {shown(found)}"
            raise FormatError(f"{self.path}: {what}; {MARK} {VERSION} is read, see docs/traces.md")
        self.engine = printable(metadata.get(ENGINE, "an unnamed engine"))
        self.mode = metadata.get(MODE, "dense")
        self.tokens = self._numbers(TOKENS)
        self.arithmetic = metadata.get(ARITHMETIC, "float32")
        self.context = self._whole(CONTEXT, len(self.tokens))
        self.positions = self._positions()
        self.config = self._object(CONFIG, {})
        self.summaries = self._summaries() if SUMMARIES in metadata else None
        held = self.file.tensors.keys() if self.summaries is None else self.summaries.keys()
        order = self._json(ORDER, []) if self.summaries is None else list(self.summaries)
        if not isinstance(order, list):
            raise FormatError(f"{self.path}: metadata {ORDER} is not a list of names")
        named = [name for name in order if isinstance(name, str) and name in held]
        self.names = list(dict.fromkeys([*named, *sorted(held - set(named))]))

    @property
    def how(self) -> Arithmetic:
        """The Arithmetic that the trace names. Raises UserError where there is none of that name,
        or its file is not sound."""
        return arithmetic_named(self.arithmetic, f"{self.path}: metadata {ARITHMETIC}")

    @property
    def golden(self) -> bool:
        """Whether it holds summaries, and the noise that an engine may have: see golden.py."""
        return SUMMARIES in self.file.metadata and NOISE in self.file.tensors

    def _json(self, key: str, default: Any) -> Any:
        text = self.file.metadata.get(key)
        if text is None:
            return default
        return bounded_json.parse(text, f"{self.path}: metadata {key}")

    def _object(self, key: str, default: JsonObject) -> JsonObject:
        found = self._json(key, default)
        if not isinstance(found, dict):
            raise FormatError(f"{self.path}: metadata {key} is not a JSON object")
        return found

    def _whole(self, key: str, default: int) -> int:
        found = self._json(key, default)
        if not is_whole(found, default, MOST_TOKENS):
            raise FormatError(
                f"{self.path}: metadata {key} is {shown(found)}, not a whole number from the "
                f"{default} tokens of the text on"
            )
        return found

    def _numbers(self, key: str) -> Int64Array:
        found = self._json(key, None)
        if not isinstance(found, list) or not found or not all(is_whole(n, 0) for n in found):
            raise FormatError(f"{self.path}: metadata {key} is not a list of whole numbers")
        if max(found) >= MOST_TOKENS:
            raise FormatError(f"{self.path}: metadata {key} holds {shown(max(found))}: too large")
        return np.array(found, dtype=np.int64)

    def _positions(self) -> Int64Array:
        if POSITIONS not in self.file.metadata:
            return np.arange(len(self.tokens))
        found = self._numbers(POSITIONS)
        if found[-1] >= len(self.tokens) or (np.diff(found) <= 0).any():
            raise FormatError(
                f"{self.path}: metadata {POSITIONS} is not an ascending list of positions of its "
                f"{len(self.tokens)} tokens"
            )
        return found

    def _summaries(self) -> dict[str, tuple[list[int], str]]:
        found, listed = {}, self._json(SUMMARIES, [])
        for entry in listed if isinstance(listed, list) else [None]:
            if (
                not isinstance(entry, list)
                or [type(part) for part in entry] != [str, str, list, str]
                or not all(is_whole(n, 1) for n in entry[2])
            ):
                raise FormatError(f"{self.path}: metadata {SUMMARIES} has an entry {shown(entry)}")
            found[entry[0]] = entry[2], entry[3]
        self.rows_of = {name: row for row, name in enumerate(found)}
        widths = {"moments": len(MOMENTS), "sample": SAMPLE}
        if self.golden:
            widths[NOISE] = SAMPLE
        for name, width in widths.items():
            info = self.file.tensors.get(name)
            if info is None or info.dtype != "F64" or info.shape != (len(found), width):
                raise FormatError(
                    f"{self.path}: its {len(found)} summaries have no tensor {name} of the shape "
                    f"{[len(found), width]} in F64"
                )
        return found

    def read(self, name: str) -> AnyArray:
        """A value (T, ...) of the trace, as it is stored; bfloat16 becomes float32."""
        info = self.file.tensors[name]
        if not info.shape or info.shape[0] != len(self.positions):
            raise FormatError(
                f"{self.path}: tensor {shown(name)} has the shape {list(info.shape)}, which does "
                f"not begin with the trace's {len(self.positions)} tokens"
            )
        return read_tensor(self.file, name)

    def digest(self, name: str) -> str:
        """The digest of a value's bytes, as its summary has it."""
        if self.summaries is not None:
            return self.summaries[name][1]
        info = self.file.tensors[name]
        return hashlib.sha256(self.file.read_bytes(info.offset, info.nbytes).tobytes()).hexdigest()[
            :DIGEST
        ]

    def summary(self, name: str, what: str) -> Float64Array:
        """The "moments" or the "sample" of a value, or, in a golden, its "noise"."""
        info, row = self.file.tensors[what], self.rows_of[name]
        size = info.nbytes // info.shape[0]
        return self.file.read_bytes(info.offset + row * size, size).view(np.float64)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_tensor(file: SafetensorsFile, name: str) -> AnyArray:
    """A tensor as it is stored; bfloat16 becomes float32. Raises FormatError."""
    info, what = file.tensors[name], f"{file.path}: tensor {shown(name)}"
    if info.nbytes > MOST_VALUE:
        raise FormatError(f"{what} has {info.nbytes:,} bytes, more than {MOST_VALUE:,}")
    if info.dtype == "BF16":
        return file.read_rows(name).reshape(info.shape)
    if info.dtype not in NUMPY:
        raise FormatError(f"{what} is {info.dtype}; BF16 and {', '.join(NUMPY)} are read")
    return file.read_bytes(info.offset, info.nbytes).view(NUMPY[info.dtype]).reshape(info.shape)


def write_trace(
    path: Path | str,
    values: Sequence[Value],
    arrays: Mapping[str, AnyArray],
    engine: str,
    config: JsonObject,
    tokens: Sequence[int],
    positions: Sequence[int] | None = None,
    arithmetic: str = "float32",
    context: int | None = None,
) -> None:
    """Write a trace whose values are in memory already.

    values  in the order of execution; arrays: {name: (T, ...)}
    Raises UserError where the file cannot be written.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    rows = np.arange(len(ids)) if positions is None else np.asarray(positions, dtype=np.int64)
    metadata = trace_metadata(engine, config, ids, rows, arithmetic=arithmetic, context=context)
    with TraceWriter(path, values, len(rows), metadata) as writer:
        for value in values:
            writer.rows(value, 0, arrays[value.name])


def is_trace(path: Path | str) -> bool:
    """Whether the file is a trace, and no model."""
    if Path(path).is_dir() or is_gguf(path):
        return False
    with SafetensorsFile(path) as file:
        return MARK in file.metadata
