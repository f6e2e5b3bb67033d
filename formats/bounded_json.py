"""JSON from untrusted files, with a bound on memory that is known before parsing.

A Python object takes up to twenty times the memory of the text that describes it ("[]," is three
bytes of JSON and 64 bytes of DRAM), so the length of a text does not bound the memory. Counting
the characters that open objects does, at the speed of memory.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import FormatError, reason, shown
from .files import read_bytes

JsonObject = dict[str, Any]

MOST = 256 << 20  # bytes in memory; a model of 4096 layers with 60,000 tensors takes a third of it
MOST_NESTED = 64  # lists and objects within each other
# Upper bounds in bytes of DRAM per character: an object; a list with one element; a list entry and
# a number; a dict entry with its temporary key-value pair; half a string.
COSTS = {b"{": 72, b"[": 104, b",": 40, b":": 130, b'"': 28}


def parsed_bytes(raw: bytes | bytearray) -> int:
    """An upper bound on the memory that parsing ``raw`` takes, in bytes."""
    # One character beyond ASCII widens all characters of its string to up to four bytes.
    wide = b"\\u" in raw or not raw.isascii()
    return len(raw) * (8 if wide else 2) + sum(raw.count(c) * n for c, n in COSTS.items())


def parse(
    raw: str | bytes | bytearray,
    what: object,
    most: int = MOST,
    unique: bool = False,
    finite: bool = False,
) -> Any:
    """The value of a JSON text, given as a string or as UTF-8 bytes.

    what    the text's name, with which error messages begin
    most    bytes of memory that parsing may take
    unique  refuse an object that has a key twice
    finite  refuse NaN, Infinity and numbers beyond float64
    Raises FormatError.
    """
    raw = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    needed = parsed_bytes(raw)
    if needed > most:
        raise FormatError(
            f"{what}: could take {needed >> 20:,} MiB of memory; {most >> 20:,} MiB is the most "
            "it may"
        )
    hooks: JsonObject = {"object_pairs_hook": _unique_keys} if unique else {}
    if finite:
        hooks.update(parse_constant=_refuse_constant, parse_float=_finite)
    try:
        value = json.loads(raw.decode("utf-8", "surrogatepass"), **hooks)
        _refuse_nesting(value)
        return value
    except (ValueError, RecursionError) as error:  # from UTF-8, JSON, hooks, or 5000 digits
        raise FormatError(f"{what}: not JSON: {reason(error)}") from None


def read_json(path: Path, most: int = MOST) -> JsonObject:
    """A JSON object from a file. Parsing it may take ``most`` bytes of memory.

    Raises FormatError, naming the file, where it holds anything else.
    """
    if not path.exists():
        raise FormatError(f"{path}: does not exist")
    value = parse(read_bytes(path), path, most)
    if not isinstance(value, dict):
        raise FormatError(f"{path}: not a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands twice")
    return entries


def _refuse_nesting(value: Any) -> None:
    level = [value]
    for _ in range(MOST_NESTED):
        inner = [v for v in level if isinstance(v, (list, dict))]
        level = [v for c in inner for v in (c.values() if isinstance(c, dict) else c)]
        if not level:
            return
    raise ValueError(f"nested more than {MOST_NESTED} deep")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{shown(text)} is beyond float64")
    return value
