"""Another engine's logits for a text, in a file: of NumPy (.npy, .npz) or safetensors."""

import io
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np

from flashinfer.formats import bounded_json
from flashinfer.formats.arrays import AnyArray, Float32Array, Float64Array
from flashinfer.formats.errors import FormatError, UserError, reason, shown
from flashinfer.formats.files import open_regular
from flashinfer.formats.safetensors import SafetensorsFile

NAME = "logits"  # of the array in a file that has several, as a trace has
TRACE_TOKENS = "flashinfer.tokens"  # in a trace's metadata, see docs/traces.md
FLOATS = ("<f2", "<f4", "<f8")
MOST_HEADER = 1 << 16  # bytes of a .npy file's header


class OtherLogits:
    """The logits (T, vocab_size) of an open file, which is read some rows at a time.

    Raises FormatError where it is not such a file, UserError where its logits are of another shape,
    or it is a trace of other tokens.
    """

    def __init__(self, path: Path | str, token_ids: list[int], vocab_size: int) -> None:
        self.path, shape = Path(path), (len(token_ids), vocab_size)
        self._open = ExitStack()
        try:
            self.file = _opened(self.path, self._open)
            if self.file.shape != shape:
                raise UserError(
                    f"{path}: has logits of shape {shown(self.file.shape)}; for a text of "
                    f"{shape[0]} tokens and a vocabulary of {shape[1]} it has to be {shape}"
                )
            if self.file.tokens is not None and self.file.tokens != token_ids:
                raise UserError(f"{path}: is a trace of other tokens than this text's")
        except BaseException:
            self._open.close()
            raise

    def rows(self, first: int, n: int) -> Float32Array | Float64Array:
        """The rows first:first + n, (n, vocab_size). Raises FormatError where one is not finite."""
        rows = self.file.rows(first, n)
        for number, row in enumerate(rows, first):
            if not np.isfinite(row).all():
                token = int(np.flatnonzero(~np.isfinite(row))[0])
                raise FormatError(
                    f"{self.path}: the logit of token id {token} after token {number} of the text "
                    f"is {row[token]}"
                )
        return rows

    def __enter__(self) -> "OtherLogits":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()


def _opened(path: Path, opened: ExitStack) -> "_Npy | _Safetensors":
    """The file's logits, told by its first bytes; what was opened is ``opened``'s to close."""
    with open_regular(path) as file:
        magic = file.read(6)
    if magic == np.lib.format.MAGIC_PREFIX:
        return _Npy(opened.enter_context(io.BufferedReader(open_regular(path))), path)
    if magic[:4] == b"PK\x03\x04":
        return _Npy(_member(path, opened), path)
    if path.suffix == ".safetensors":
        return _Safetensors(opened.enter_context(SafetensorsFile(path)))
    raise FormatError(f"{path}: is not a .npy, .npz or .safetensors file")


def _member(path: Path, opened: ExitStack) -> IO[bytes]:
    """The logits of a .npz file, the array of that name or the only one, open for reading."""
    try:
        whole = opened.enter_context(zipfile.ZipFile(opened.enter_context(open_regular(path))))
        names = whole.namelist()
        name = names[0] if len(names) == 1 else f"{NAME}.npy"
        if name not in names:
            raise FormatError(f"{path}: has {len(names)} arrays and none is named {NAME}")
        return opened.enter_context(whole.open(name))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        raise FormatError(f"{path}: is not a sound .npz file: {reason(error)}") from None


class _Npy:
    """Of an open .npy file: ``shape``, ``tokens`` (unknown) and ``rows``."""

    tokens: list[int] | None = None

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path = file, path
        try:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            self.shape, fortran, self.dtype = read(file, max_header_size=MOST_HEADER)
        except (ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise FormatError(f"{path}: is not a sound .npy file: {reason(error)}") from None
        if self.dtype.str not in FLOATS or len(self.shape) != 2 or fortran:
            order = " in Fortran order" if fortran else ""
            raise FormatError(
                f"{path}: has {shown(str(self.dtype))} of shape {shown(self.shape)}{order}; logits "
                "are float16, float32 or float64, a row for each token"
            )
        self.begin, self.row_bytes = file.tell(), self.shape[1] * self.dtype.itemsize

    def rows(self, first: int, n: int) -> AnyArray:
        """The rows first:first + n."""
        try:
            self.file.seek(self.begin + first * self.row_bytes)
            raw = self.file.read(n * self.row_bytes)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise FormatError(f"{self.path}: cannot be read: {reason(error)}") from None
        if len(raw) < n * self.row_bytes:
            raise FormatError(f"{self.path}: ends before row {first + n}: it is cut off")
        rows = np.frombuffer(raw, dtype=self.dtype).reshape(n, self.shape[1])
        return rows.astype(np.float32) if rows.itemsize == 2 else rows


class _Safetensors:
    """Of an open safetensors file: ``shape``, a trace's ``tokens``, and ``rows``."""

    def __init__(self, file: SafetensorsFile) -> None:
        self.file, names = file, list(file.tensors)
        self.name = names[0] if len(names) == 1 else NAME
        if self.name not in names:
            raise FormatError(f"{file.path}: has {len(names)} tensors and none is named {NAME}")
        self.shape, self.tokens = file.tensors[self.name].shape, None
        if TRACE_TOKENS in file.metadata:
            where = f"{file.path}: {TRACE_TOKENS}"
            self.tokens = bounded_json.parse(file.metadata[TRACE_TOKENS], where)

    def rows(self, first: int, n: int) -> Float32Array:
        """The rows first:first + n."""
        return self.file.read_rows(self.name, first, first + n)
