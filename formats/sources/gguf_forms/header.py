"""The header of a GGUF file as the forms read it: metadata by key, and which tensors there are."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...config import MOST_LAYERS
from ...errors import FormatError, shown
from ...numbers import is_number, is_whole
from ..gguf import GgufFile, GgufTensor
from ..split_gguf import SplitGguf

# {the type that a metadata key should have: (whether a value has it, its name for people)}
KINDS_OF_VALUES: dict[type, tuple[Callable[[Any], bool], str]] = {
    int: (is_whole, "a whole number"),
    float: (is_number, "a number"),
    str: (lambda value: isinstance(value, str), "a text"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
}
OF_LAYER = re.compile(r"blk\.\d+\.(.+)")


class Header:
    """The metadata and tensors of an open GGUF file.

    architecture  GGUF's name of it
    known         the keys of the architecture that were read, without its name before them
    kinds         what tensors of its layers are called, whichever layer: {"attn_q.weight", ...}
    """

    def __init__(self, file: GgufFile | SplitGguf, path: Path) -> None:
        self.file, self.path = file, path
        self.tensors: dict[str, GgufTensor] = file.tensors
        self.kinds = {found[1] for name in self.tensors if (found := OF_LAYER.fullmatch(name))}
        self.known: set[str] = set()
        self.architecture: str = self.get("general.architecture", str)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """metadata[key], or None where it is missing.

        Raises FormatError where it is not of this ``kind``, or is a missing text or flag.
        """
        value = self.file.metadata.get(key, default)
        is_sound, what = KINDS_OF_VALUES[kind]
        if value is not None and not is_sound(value):
            raise FormatError(f"{self.path}: metadata {key} is {shown(value)}, not {what}")
        if value is None and kind in (str, bool):
            raise FormatError(f"{self.path}: metadata {key} is missing")
        return value

    def of(self, key: str, kind: type = int, default: Any = None) -> Any:
        """The same of a key of the architecture."""
        self.known.add(key)
        return self.get(f"{self.architecture}.{key}", kind, default)

    def layers(self) -> int:
        """How many layers there are. Raises FormatError where that is no such number."""
        layers = self.of("block_count")
        if not is_whole(layers, 1, MOST_LAYERS):
            raise FormatError(
                f"{self.path}: metadata {self.architecture}.block_count is {shown(layers)}, not "
                f"within 1 to {MOST_LAYERS}"
            )
        return layers

    def layers_and_further(self) -> tuple[int, int]:
        """How many layers the model proper has, and how many after it predict further tokens.
        Raises FormatError where these are not fewer than all."""
        layers, further = self.layers(), self.of("nextn_predict_layers", int, 0)
        if not 0 <= further < layers:
            raise self.refusal("nextn_predict_layers")
        return layers - further, further

    def of_layers(self, key: str, kind: type = int) -> list[Any] | None:
        """The same of each layer, where they may differ: one value stands for all of them.

        Raises FormatError where there is another number of values than of layers.
        """
        layers = self.layers()
        if not self.is_list(key):
            value = self.of(key, kind)
            return None if value is None else [value] * layers
        self.known.add(key)
        values = self.file.metadata[f"{self.architecture}.{key}"].tolist()
        if kind is bool and set(values) <= {0, 1}:
            values = [bool(value) for value in values]
        is_sound, what = KINDS_OF_VALUES[kind]
        if len(values) != layers or not all(is_sound(value) for value in values):
            raise FormatError(
                f"{self.path}: metadata {self.architecture}.{key} is {shown(values)}, not {what} "
                f"for each of {layers} layers"
            )
        return values

    def of_all_layers(self, key: str, kind: type = int) -> Any:
        """The same where layers may not differ."""
        if not self.is_list(key):
            return self.of(key, kind)
        values = self.of_layers(key, kind) or [None]
        if any(value != values[0] for value in values):
            raise FormatError(
                f"{self.path}: metadata {self.architecture}.{key} is {shown(values)}; layers that "
                f"differ in it are not supported for {self.architecture}"
            )
        return values[0]

    def refusal(self, key: str) -> FormatError:
        """The error of a key of the architecture whose value is not supported."""
        value = self.file.metadata.get(f"{self.architecture}.{key}")
        return FormatError(
            f"{self.path}: metadata {shown(f'{self.architecture}.{key}')} is {shown(value)}, which "
            "is not supported"
        )

    def is_list(self, key: str) -> bool:
        """Whether a key of the architecture has several values."""
        return isinstance(self.file.metadata.get(f"{self.architecture}.{key}"), np.ndarray)

    def vector(self, name: str) -> list[float]:
        """The numbers of a tensor that is a row of F32. Raises FormatError where it is none."""
        tensor = self.tensors[name]
        if len(tensor.shape) != 1 or tensor.type.name != "F32":
            raise FormatError(f"{self.path}: tensor {name} is not a row of F32")
        values = self.file.decode(tensor.type, self.file.raw_rows(name))
        return [float(value) for value in values.reshape(-1)]
