"""Kinds of arguments of kernels: each function accepts one kind, or raises ValueError."""

import operator
from collections.abc import Collection
from typing import Any

import numpy as np

from flashinfer.formats.arrays import AnyArray, BoolArray, Int64Array
from flashinfer.formats.layers.attention import LEAST_CAP, MOST_CAP
from flashinfer.formats.number_formats import FORMATS, NumberFormat

Dtypes = tuple[np.dtype[Any], ...]

# The most of an offset, a length or a token's number: the sum of two stays within 64 bits.
MOST = 1 << 62
LARGEST = float(np.finfo(np.float32).max)
FLOATS: Dtypes = (np.dtype(np.float32),)
KEYS: Dtypes = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.uint8))  # and values
DOUBLES: Dtypes = (np.dtype(np.float64),)
BYTES: Dtypes = (np.dtype(np.uint8),)
INT32: Dtypes = (np.dtype(np.int32),)
INT64: Dtypes = (np.dtype(np.int64),)


def array(
    name: str, value: Any, dtypes: Dtypes, dimensions: int | None, writable: bool = False
) -> None:
    """Accepts a C-contiguous, aligned array of one of these dtypes.

    dimensions  how many the array must have; None: any number
    """
    kind = " or ".join(dtype.name for dtype in dtypes)
    wanted = f"{name} must be a {'writable, ' if writable else ''}contiguous array of {kind}"
    wanted += "" if dimensions is None else f" in {dimensions} dimensions"
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{wanted}, not {type(value).__name__}")
    flags, given = value.flags, f"{value.dtype} {value.shape}"
    if value.dtype not in dtypes or dimensions not in (None, value.ndim):
        raise ValueError(f"{wanted}, not {given}")
    if not (flags.c_contiguous and flags.aligned and (flags.writeable or not writable)):
        raise ValueError(f"{wanted}; this {given} is scattered, unaligned or read-only")


def whole(name: str, value: Any, low: int, high: int) -> int:
    """Accepts a whole number from ``low`` to ``high``, and returns it as Python's int."""
    try:
        sound = not isinstance(value, bool) and low <= operator.index(value) <= high
    except TypeError:
        sound = False
    if not sound:
        raise ValueError(f"{name} is {str(value)[:40]}, not a whole number from {low} to {high}")
    return operator.index(value)


def number(name: str, value: Any, low: float) -> None:
    """Accepts a number from ``low`` on that float32 can hold."""
    sound = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not (sound and low <= value <= LARGEST):
        raise ValueError(f"{name} is {str(value)[:40]}, not a number from {low} to {LARGEST}")


def word(name: str, value: Any, words: Collection[str]) -> None:
    """Accepts one of these words."""
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(words)}")


def switch(name: str, value: Any) -> None:
    """Raise ValueError unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, not True or False")


def soft_cap(value: float) -> None:
    if not LEAST_CAP <= value <= MOST_CAP:
        raise ValueError(f"a cap of {value} is not within {LEAST_CAP} to {MOST_CAP}")


def vector(name: str, value: Any, length: int) -> None:
    """Accepts a vector of ``length`` float32, or None."""
    if value is None:
        return
    array(name, value, FLOATS, 1)
    if len(value) != length:
        raise ValueError(f"{name} has {len(value)} values, not {length}")


def row_bytes(format: Any, columns: int) -> int:
    if not isinstance(format, NumberFormat) or format is not FORMATS.get(format.name):
        raise ValueError(f"format is {format!r:.40}, not one of {', '.join(FORMATS)}")
    return format.row_bytes(columns)


def cached_width(cache: AnyArray) -> int:
    """Values of a row of a key/value cache; of a cache of bytes, which has rows of q8_0's blocks,
    a multiple of 32."""
    if cache.dtype != np.uint8:
        return cache.shape[2]
    blocks, rest = divmod(cache.shape[2], FORMATS["q8_0"].block_bytes)
    if rest:
        raise ValueError(f"rows of {cache.shape[2]} bytes are no blocks of q8_0")
    return blocks * FORMATS["q8_0"].block


def rows_inside(memory: Any, rows: Any, format: Any, columns: int) -> None:
    """Accepts rows of ``columns`` values that begin at the offsets ``rows`` of ``memory``."""
    array("memory", memory, BYTES, 1)
    array("rows", rows, INT64, 1)
    last = len(memory) - row_bytes(format, columns)
    for i in np.flatnonzero((rows < 0) | (rows > last)):
        raise ValueError(f"row {i} at byte {rows[i]} is outside the {len(memory)} bytes")


def csr_pairs(indptr: Any, tokens: Any, n_rows: int, n_tokens: int) -> None:
    """Accepts, in CSR form, which tokens use which row; None for both: all use all."""
    if indptr is None and tokens is None:
        return
    array("indptr", indptr, INT32, 1)
    array("tokens", tokens, INT32, 1)
    if len(indptr) != n_rows + 1 or indptr[0] != 0 or indptr[-1] != len(tokens):
        raise ValueError(f"indptr does not fit {n_rows} rows and {len(tokens)} tokens")
    if (np.diff(indptr.astype(np.int64)) < 0).any():
        raise ValueError("indptr is not ascending")
    row = np.repeat(np.arange(n_rows), np.diff(indptr))
    falls = (np.diff(row) == 0) & (np.diff(tokens.astype(np.int64)) <= 0)
    if falls.any() or (len(tokens) and not 0 <= tokens.min() <= tokens.max() < n_tokens):
        raise ValueError(f"the tokens of a row are not ascending and within 0 to {n_tokens - 1}")


def together(**arrays: Any) -> None:
    """Accepts vectors of int64 of equal length."""
    for name, value in arrays.items():
        array(name, value, INT64, 1)
    if len({len(value) for value in arrays.values()}) > 1:
        raise ValueError(", ".join(f"{len(value)} {name}" for name, value in arrays.items()))


def apart(name: str, written: AnyArray, **others: AnyArray | None) -> None:
    """Accepts an array to write that shares no memory with the others, which are read."""
    for other, value in others.items():
        if value is not None and np.may_share_memory(written, value):
            raise ValueError(f"{name} and {other} share memory")


def inside(begins: Int64Array, lengths: Int64Array, size: int) -> BoolArray:
    """Whether each of these ranges lies within ``size`` bytes."""
    return (begins >= 0) & (lengths >= 0) & (begins <= size) & (lengths <= size - begins)
