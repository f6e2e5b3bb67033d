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
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.formats.arrays import AnyArray
from flashinfer.formats.errors import FormatError, UserError, shown
from flashinfer.formats.files import read_bytes
from flashinfer.formats.numbers import is_whole
from flashinfer.formats.safetensors import SafetensorsFile
from flashinfer.formats.toml import read_toml
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.oracle.trace_file import write_trace
from flashinfer.transformer.values import Value, values_of

MOST_ARRAYS = 4 << 30  # bytes of an .npz or .npy file, and of each array in it
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
    ids = list(tokens or (name_map.tokens if name_map else None) or ())
    if not ids:
        raise UserError(f"{source}: give the text's token ids, with --tokens or in the name map")
    arrays = read_arrays(source)
    values = {v.name: v for v in values_of(weights.config, weights.naming)}
    found: dict[str, AnyArray] = {}
    for theirs, array in arrays.items():
        ours = name_map.ours(theirs) if name_map else theirs
        if ours is None:
            continue
        if ours not in values:
            where = name_map.path if name_map else source
            raise FormatError(
                f"{where}: {shown(ours)} is no value of this model, see docs/traces.md"
            )
        found[ours] = _rows(array, values[ours], len(ids), f"{source}: array {shown(theirs)}")
    if not found:
        some = ", ".join(list(arrays)[:3]) or "nothing"
        raise FormatError(f"{source}: none of its arrays ({some}) is named in the map")
    order = [value for value in values.values() if value.name in found]
    engine, how = (name_map.engine, name_map.arithmetic) if name_map else ("an engine", "float32")
    write_trace(path, order, found, engine, weights.hf_config, ids, arithmetic=how)
    left_out = [name for name in arrays if (name_map.ours(name) if name_map else name) is None]
    return left_out


def _rows(array: AnyArray, value: Value, n_tokens: int, what: str) -> AnyArray:
    if array.size != n_tokens * math.prod(value.shape):
        raise FormatError(
            f"{what} has the shape {list(array.shape)}; {value.name} of {n_tokens} tokens has "
            f"{[n_tokens, *value.shape]}"
        )
    if array.dtype.kind not in "fiub":
        raise FormatError(f"{what} holds no numbers")
    return array.reshape(n_tokens, *value.shape)


def read_arrays(path: Path | str) -> dict[str, AnyArray]:
    """{name: array} of an .npz, .npy or .safetensors file; an .npy's name is the file's.

    Raises FormatError where it is none of these, or not sound.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        with SafetensorsFile(path) as file:
            return {
                name: file.read_rows(name).reshape(info.shape)
                for name, info in file.tensors.items()
                if info.dtype in ("F32", "F16", "BF16")
            }
    if suffix not in (".npy", ".npz"):
        raise FormatError(f"{path}: is not an .npz, .npy or .safetensors file")
    raw = io.BytesIO(read_bytes(path, MOST_ARRAYS))
    try:
        if suffix == ".npy":
            return {Path(path).stem: np.load(raw, allow_pickle=False)}
        with zipfile.ZipFile(raw) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MOST_ARRAYS:
                raise FormatError(f"{path}: its arrays have more than {MOST_ARRAYS:,} bytes")
        with np.load(raw, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError, MemoryError) as error:
        raise FormatError(f"{path}: is damaged, or holds Python objects: {error}") from None
