"""Traces of any engine: arrays in a file of NumPy's or of safetensors, and a map of their names.

The map is a TOML file:

    engine = "my engine 1.2"
    arithmetic = "float32"            # or a .toml file; see arithmetic.py
    tokens = [2, 10, 15]              # or --tokens

    [names]                           # theirs = "ours"; {} is the layer
    "blk{}/q" = "model.layers.{}.self_attn.q_proj"
    "out" = "logits"
"""

import io
import lzma
import math
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.formats.arrays import AnyArray
from flashinfer.formats.errors import FormatError, UserError, reason, shown
from flashinfer.formats.files import open_regular, read_bytes
from flashinfer.formats.numbers import is_whole
from flashinfer.formats.safetensors import SafetensorsFile
from flashinfer.formats.toml import read_toml
from flashinfer.oracle.arithmetic import arithmetic_named
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.oracle.trace_file import read_tensor, write_trace
from flashinfer.transformer.values import Value, values_of

MOST_HEADER = 1 << 16  # bytes before the numbers of an .npy file
LARGEST_ITEM = 16  # bytes of a number
# What reading an .npz or .npy file fails with where it is not sound.
DAMAGED = (
    ValueError, TypeError, OSError, EOFError, KeyError, MemoryError, OverflowError, RuntimeError,
    IndexError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
    struct.error,
)  # fmt: skip
LAYER = r"(\d+)"


class NameMap:
    """A name map, read and checked. Raises FormatError, naming the file and the line of fault."""

    def __init__(self, path: Path | str) -> None:
        self.path, given = path, read_toml(path)
        known = {"engine", "arithmetic", "tokens", "names"}
        if unknown := given.keys() - known:
            raise FormatError(f"{path}: {min(unknown)} is not one of {', '.join(sorted(known))}")
        self.engine = self._text(given, "engine", "an unnamed engine")
        self.arithmetic = self._text(given, "arithmetic", "float32")
        tokens = given.get("tokens")
        if tokens is not None and not (
            isinstance(tokens, list) and tokens and all(is_whole(t, 0) for t in tokens)
        ):
            raise FormatError(f"{path}: tokens is not a list of whole numbers")
        self.tokens: list[int] | None = tokens
        names = given.get("names", {})
        if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
            raise FormatError(f"{path}: names is not a table of texts")
        self.rules = [(self._pattern(theirs), theirs, ours) for theirs, ours in names.items()]
        for _, theirs, ours in self.rules:
            if theirs.count("{}") != ours.count("{}") or theirs.count("{}") > 1:
                raise FormatError(f"{path}: {shown(theirs)} and {shown(ours)} differ in their {{}}")

    def _text(self, given: Mapping[str, Any], key: str, default: str) -> str:
        found = given.get(key, default)
        if not isinstance(found, str):
            raise FormatError(f"{self.path}: {key} is not a text")
        return found

    @staticmethod
    def _pattern(theirs: str) -> re.Pattern[str]:
        return re.compile(LAYER.join(re.escape(part) for part in theirs.split("{}")))

    def ours(self, theirs: str) -> str | None:
        """Our name of one of theirs, or None."""
        for pattern, _, ours in self.rules:
            if found := pattern.fullmatch(theirs):
                return ours.replace("{}", found[1]) if "{}" in ours else ours
        return None


def import_trace(
    source: Path | str,
    weights: ModelWeights,
    path: Path | str,
    name_map: NameMap | None = None,
    tokens: Sequence[int] | None = None,
) -> list[str]:
    """Write the arrays in ``source`` (.npz, .npy or .safetensors) as a trace; returns the names of
    its arrays that were left out.

    name_map  None: they have our names already
    tokens    the ids of the text; None: those of the map
    Raises FormatError where the arrays are not those of the model, UserError where tokens are
    missing.
    """
    ids = _token_ids(source, weights, name_map, tokens)
    engine, how = (name_map.engine, name_map.arithmetic) if name_map else ("an engine", "float32")
    arithmetic_named(how, f"{name_map.path if name_map else source}: arithmetic")
    values = {v.name: v for v in values_of(weights.config, weights.naming)}
    found: dict[str, AnyArray] = {}
    left_out = []
    with ArrayFile(source) as arrays:
        for theirs in arrays.names:
            ours = name_map.ours(theirs) if name_map else theirs
            if ours is None:
                left_out.append(theirs)
                continue
            where = name_map.path if name_map else source
            if ours not in values:
                raise FormatError(
                    f"{where}: {shown(ours)} is no value of this model, see docs/traces.md"
                )
            if ours in found:
                raise FormatError(f"{where}: {shown(theirs)} is the second array called {ours}")
            found[ours] = _rows(arrays, theirs, values[ours], len(ids))
    if not found:
        some = ", ".join(left_out[:3]) or "nothing"
        raise FormatError(f"{source}: none of its arrays ({some}) is named in the map")
    order = [value for value in values.values() if value.name in found]
    write_trace(path, order, found, engine, weights.hf_config, ids, arithmetic=how)
    return left_out


def _token_ids(
    source: Path | str,
    weights: ModelWeights,
    name_map: NameMap | None,
    tokens: Sequence[int] | None,
) -> list[int]:
    ids = list(tokens or (name_map.tokens if name_map else None) or ())
    if not ids:
        raise UserError(f"{source}: give the text's token ids, with --tokens or in the name map")
    if max(ids) >= weights.config.vocab_size:
        where = "--tokens" if tokens or name_map is None else f"{name_map.path}: tokens"
        raise UserError(
            f"{where}: {shown(max(ids))} is not within 0 to {weights.config.vocab_size - 1}"
        )
    return ids


def _rows(arrays: "ArrayFile", theirs: str, value: Value, n_tokens: int) -> AnyArray:
    """An array as a value (n_tokens, ...). Raises FormatError."""
    what, size = f"{arrays.path}: array {shown(theirs)}", n_tokens * math.prod(value.shape)
    array = arrays.read(theirs, size * LARGEST_ITEM)
    if array.size != size:
        raise FormatError(
            f"{what} has the shape {shown(list(array.shape))}; {value.name} of {n_tokens} tokens "
            f"has {[n_tokens, *value.shape]}"
        )
    whole = value.dtype != "F32"
    if array.dtype.kind not in ("iub" if whole else "fiub"):
        raise FormatError(f"{what} holds no {'whole ' if whole else ''}numbers")
    return array.reshape(n_tokens, *value.shape)


class ArrayFile:
    """An .npz, .npy or .safetensors file, whose arrays are read when they are asked for.

    names  of its arrays; an .npy's is the file's
    Raises FormatError where it is none of these, or not sound.
    """

    def __init__(self, path: Path | str) -> None:
        self.path, suffix = Path(path), Path(path).suffix
        self.tensors: SafetensorsFile | None = None
        self.archive: zipfile.ZipFile | None = None
        if suffix == ".safetensors":
            self.tensors = SafetensorsFile(path)
            self.close, self.names = self.tensors.close, list(self.tensors.tensors)
            return
        if suffix not in (".npy", ".npz"):
            raise FormatError(f"{path}: is not an .npz, .npy or .safetensors file")
        file = open_regular(path)
        self.file, self.close, self.names = file, file.close, [self.path.stem]
        if suffix == ".npz":
            try:
                self.archive = zipfile.ZipFile(file)
            except DAMAGED as error:
                file.close()
                raise self._damaged(error) from None
            entries = self.archive.namelist()
            self.names = list(dict.fromkeys(name.removesuffix(".npy") for name in entries))

    def _damaged(self, error: BaseException) -> FormatError:
        return FormatError(f"{self.path}: is damaged, or holds Python objects: {reason(error)}")

    def read(self, name: str, most: int) -> AnyArray:
        """An array of at most ``most`` bytes. Raises FormatError."""
        if self.tensors is not None:
            return read_tensor(self.tensors, name)
        try:
            raw = self._raw(name, most + MOST_HEADER)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as of a header that Python 2 wrote
                return np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
        except FormatError:
            raise
        except DAMAGED as error:
            raise self._damaged(error) from None

    def _raw(self, name: str, most: int) -> bytes:
        """An array with its header, as a file."""
        if self.archive is None:
            return read_bytes(self.path, most)
        entries = self.archive.namelist()
        with self.archive.open(f"{name}.npy" if f"{name}.npy" in entries else name) as file:
            raw = file.read(most + 1)
        if len(raw) > most:
            raise FormatError(f"{self.path}: array {shown(name)} has more than {most:,} bytes")
        return raw

    def __enter__(self) -> "ArrayFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
