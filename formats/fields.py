"""Reading the fields of a Hugging Face config, each of which may hold anything."""

from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import FormatError, shown
from .numbers import is_number, is_whole

# No honest dimension is larger: keeps hostile configs from huge allocations.
LARGEST = 1 << 31
# No honest number lies outside of them, and between them all formulas stay finite.
SMALLEST_NUMBER, LARGEST_NUMBER = 2.0**-126, 2.0**100
Fields = dict[str, Any]
ABSENT = object()  # the default of a field that says something else by null than where it is absent
Kind = TypeVar("Kind")


def dimension(config: Fields, key: str, default: int | None = None, most: int = LARGEST) -> int:
    """The positive integer ``config[key]``. Raises FormatError where it is not one."""
    value = config.get(key)
    value = default if value is None else value
    if not is_whole(value, 1, most - 1):
        raise FormatError(f"config: {key} is {shown(value)}, not a positive whole number")
    return int(value)


def number(config: Fields, key: str, zero: bool = False) -> float:
    """The positive number ``config[key]``, or 0 where ``zero`` allows it. Raises FormatError."""
    value = config.get(key)
    if not is_number(value):
        raise FormatError(f"config: {key} is {shown(value)}, not a number")
    if not (is_number(value, SMALLEST_NUMBER, LARGEST_NUMBER) or (zero and value == 0)):
        raise FormatError(f"config: {key} is {shown(value)}, not a positive number of float32")
    return float(value)


def flag(config: Fields, key: str) -> bool:
    """The boolean ``config[key]``; null is false. Raises FormatError where it is neither."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise FormatError(f"config: {key} is {shown(value)}, not true or false")
    return bool(value)


def token_ids(config: Fields, key: str) -> tuple[int, ...]:
    """``config[key]``, which may be absent, one id or a list of ids, as a tuple."""
    value = config.get(key)
    values = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(is_whole(v, 0, LARGEST - 1) for v in values):
        raise FormatError(f"config: {key} is {shown(value)}, not a token id or a list of them")
    return values


def of_layers(key: str, names: object, kinds: Mapping[str, Kind], layers: int) -> list[Kind]:
    """The kinds of the layers that ``names``, the value of ``key``, lists. Raises FormatError where
    it lists another number of layers, or has another name."""
    if not isinstance(names, list) or len(names) != layers:
        raise FormatError(f"config: {key} is {shown(names)}, not a list of {layers}")
    return [kind_of(key, name, kinds) for name in names]


def kind_of(key: str, name: object, kinds: Mapping[str, Kind]) -> Kind:
    """The kind of a layer that the value of ``key`` calls so. Raises FormatError."""
    if not isinstance(name, str) or name not in kinds:
        raise FormatError(f"config: {key} has {shown(name)}; supported: {', '.join(kinds)}")
    return kinds[name]
