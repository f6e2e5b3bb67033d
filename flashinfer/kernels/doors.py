"""Checks of the kernels' arguments: one function per kernel, a door that sound arguments pass.

A door takes whatever the kernel was called with, and raises ValueError where that does not fit. A
NumPy twin calls its door first. A compiled twin checks the same in C, and calls the door for the
message, so that both refuse the same arguments in the same words.
"""

import functools
import operator
from collections.abc import Callable, Collection
from typing import Any, ParamSpec, TypeVar

import numpy as np

from flashinfer.formats.arrays import AnyArray, BoolArray, Int64Array
from flashinfer.formats.layers.attention import LEAST_CAP, MOST_CAP
from flashinfer.formats.number_formats import FORMATS, NumberFormat
from flashinfer.kernels.activations import ACTIVATIONS

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Dtypes = tuple[np.dtype[Any], ...]

# The most of an offset, a length or a token's number: the sum of two stays within 64 bits.
MOST = 1 << 62
MOST_THREADS = 1024
SCORINGS = ("softmax", "sigmoid")  # of a mixture's router
GROUP_SCORES = ("top2", "max")
LARGEST = float(np.finfo(np.float32).max)
FLOATS: Dtypes = (np.dtype(np.float32),)
HALVES: Dtypes = (np.dtype(np.float32), np.dtype(np.float16))
DOUBLES: Dtypes = (np.dtype(np.float64),)
BYTES: Dtypes = (np.dtype(np.uint8),)
INT32: Dtypes = (np.dtype(np.int32),)
INT64: Dtypes = (np.dtype(np.int64),)


def checked(
    door: Callable[..., None],
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """A decorator for a NumPy twin, whose arguments pass ``door`` first.

    Overflow gives infinities without a warning, as in the compiled twins.
    """

    def decorate(kernel: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(kernel)
        def call(*arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
            door(*arguments, **named)
            with np.errstate(all="ignore"):
                return kernel(*arguments, **named)

        return call

    return decorate


# ---------------------------------------------------------------- products


def linear(x: Any, weight: Any, bias: Any = None) -> None:
    array("x", x, FLOATS, 2)
    array("weight.data", weight.data, BYTES, 2)
    if x.shape[1] != weight.columns:
        raise ValueError(f"x is {x.shape}, weight ({len(weight.data)}, {weight.columns})")
    width = _row_bytes(weight.format, weight.columns)
    if weight.data.shape[1] != width:
        raise ValueError(
            f"weight's rows have {weight.data.shape[1]} bytes; {weight.columns} values of "
            f"{weight.format.name} have {width}"
        )
    _vector("bias", bias, len(weight.data))


def sparse_up(
    memory: Any,
    rows: Any,
    format: Any,
    x: Any,
    bias: Any = None,
    indptr: Any = None,
    tokens: Any = None,
) -> None:
    array("x", x, FLOATS, 2)
    _rows(memory, rows, format, x.shape[1])
    _pairs(indptr, tokens, len(rows), len(x))
    _vector("bias", bias, len(rows))


def sparse_down(
    memory: Any, rows: Any, format: Any, a: Any, y: Any, indptr: Any = None, tokens: Any = None
) -> None:
    array("y", y, FLOATS, 2, writable=True)
    _rows(memory, rows, format, y.shape[1])
    _pairs(indptr, tokens, len(rows), len(y))
    array("a", a, FLOATS, 2 if indptr is None else 1)
    shape = (len(rows), len(y)) if indptr is None else (len(tokens),)
    if a.shape != shape:
        raise ValueError(f"a is {a.shape}, not {shape}")
    _apart("y", y, memory=memory, rows=rows, a=a, indptr=indptr, tokens=tokens)


def activate(x: Any, kind: Any, threshold: Any = 0.0) -> None:
    array("x", x, FLOATS, None, writable=True)
    _word("kind", kind, ACTIVATIONS)
    number("threshold", threshold, -LARGEST)
    if kind == "cap":
        _cap(threshold)


def layer_norm(x: Any, weight: Any, bias: Any, epsilon: Any) -> None:
    array("x", x, FLOATS, 2)
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias must both be given, or neither")
    _vector("weight", weight, x.shape[1])
    _vector("bias", bias, x.shape[1])
    number("epsilon", epsilon, 0.0)


def rms_norm(x: Any, weight: Any, epsilon: Any) -> None:
    array("x", x, FLOATS, 2)
    _vector("weight", weight, x.shape[1])
    number("epsilon", epsilon, 0.0)


def set_threads(threads: Any) -> None:
    whole("threads", threads, 1, MOST_THREADS)


# ---------------------------------------------------------------- attention


def attention(
    q: Any,
    keys: Any,
    values: Any,
    start: Any,
    window: Any = None,
    bias: Any = None,
    cap: Any = 0.0,
    sinks: Any = None,
) -> None:
    array("q", q, FLOATS, 3)
    array("keys", keys, HALVES, 3)
    array("values", values, HALVES, 3)
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"keys are {keys.dtype} {keys.shape}, values {values.dtype} {values.shape}"
        )
    tokens, heads, width = q.shape
    groups, context, _ = keys.shape
    if not groups or heads % groups or keys.shape[2] != width or width % 32:
        raise ValueError(
            f"q is {q.shape}, keys {keys.shape}: heads of a multiple of 32 values, of which "
            "equally many share each key, are needed"
        )
    whole("start", start, 0, context - tokens)
    if window is not None:
        whole("window", window, 1, MOST)
    number("cap", cap, 0.0)
    if cap:
        _cap(cap)
    if bias is not None:
        array("bias", bias, FLOATS, 2)
        if bias.shape != (heads, context):
            raise ValueError(f"bias is {bias.shape}, not ({heads}, {context})")
    _vector("sinks", sinks, heads)


def remember(cache: Any, x: Any, start: Any) -> None:
    array("cache", cache, HALVES, 3, writable=True)
    array("x", x, FLOATS, 3)
    if cache.shape[0] != x.shape[1] or cache.shape[2] < x.shape[2]:
        raise ValueError(f"x is {x.shape}, the cache {cache.shape}")
    whole("start", start, 0, cache.shape[1] - len(x))
    _apart("cache", cache, x=x)


def rotate(x: Any, cos: Any, sin: Any) -> None:
    array("x", x, FLOATS, 3, writable=True)
    array("cos", cos, FLOATS, 2)
    array("sin", sin, FLOATS, 2)
    if cos.shape != sin.shape or len(cos) != len(x) or 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(f"x is {x.shape}, cos {cos.shape}, sin {sin.shape}")
    _apart("x", x, cos=cos, sin=sin)


# ---------------------------------------------------------------- units and their slots


def positive(scores: Any) -> None:
    array("scores", scores, FLOATS, 1)


def route(
    logits: Any,
    per_token: Any,
    normalised: Any,
    scoring: Any = "softmax",
    choice_bias: Any = None,
    groups: Any = 1,
    groups_kept: Any = 1,
    scale: Any = 1.0,
    group_by: Any = "top2",
) -> None:
    array("logits", logits, FLOATS, 2)
    experts = logits.shape[1]
    chosen = whole("per_token", per_token, 1, experts)
    _word("scoring", scoring, SCORINGS)
    _word("group_by", group_by, GROUP_SCORES)
    n_groups = whole("groups", groups, 1, experts)
    n_kept = whole("groups_kept", groups_kept, 1, n_groups)
    if experts % n_groups:
        raise ValueError(f"{experts} experts do not make {n_groups} equal groups")
    available = n_kept * (experts // n_groups)
    if chosen > available:
        raise ValueError(
            f"per_token is {chosen}, and {n_kept} of {n_groups} groups have {available} experts"
        )
    number("scale", scale, -LARGEST)
    _vector("choice_bias", choice_bias, experts)


def place(
    neurons: Any,
    token: Any,
    window: Any,
    slot_of: Any,
    neuron_at: Any,
    last_used: Any,
    priority: Any,
    used: Any,
) -> None:
    array("neurons", neurons, INT32, 1)
    array("slot_of", slot_of, INT32, 1, writable=True)
    array("neuron_at", neuron_at, INT32, 1, writable=True)
    array("last_used", last_used, INT64, 1, writable=True)
    array("priority", priority, DOUBLES, 1)
    capacity = len(neuron_at)
    if len(last_used) != capacity or len(priority) != len(slot_of):
        raise ValueError(
            f"there are {capacity} slots and {len(last_used)} last uses, "
            f"{len(slot_of)} neurons and {len(priority)} priorities"
        )
    whole("token", token, 0, MOST)
    if window is not None:
        whole("window", window, 1, MOST)
    whole("used", used, 0, capacity)
    if len(neurons) > capacity:
        raise ValueError(f"{len(neurons)} neurons do not fit the cache's {capacity} slots")
    if len(neurons) and (
        neurons[0] < 0 or neurons[-1] >= len(slot_of) or (neurons[1:] <= neurons[:-1]).any()
    ):
        raise ValueError(f"neurons are not ascending and within 0 to {len(slot_of) - 1}")
    held, slots = neuron_at[:used], slot_of[neurons]
    sound = held.min(initial=0) >= 0 and held.max(initial=-1) < len(slot_of)
    sound = sound and slots.max(initial=-1) < used
    if not (sound and np.array_equal(neuron_at[slots[slots >= 0]], neurons[slots >= 0])):
        raise ValueError("slot_of and neuron_at disagree about which slots hold what")
    written = {"slot_of": slot_of, "neuron_at": neuron_at, "last_used": last_used}
    for name, value in written.items():
        others = {other: given for other, given in written.items() if other != name}
        _apart(name, value, neurons=neurons, priority=priority, **others)


# ---------------------------------------------------------------- reads


def merge_reads(
    offsets: Any, lengths: Any, destinations: Any, gap_bytes: Any, most_bytes: Any, room: Any
) -> None:
    _together(offsets=offsets, lengths=lengths, destinations=destinations)
    whole("gap_bytes", gap_bytes, -1, MOST)
    whole("most_bytes", most_bytes, 0, MOST)
    whole("room", room, 0, MOST)
    for i in np.flatnonzero(~(_fits(offsets, lengths, MOST) & _fits(destinations, lengths, MOST))):
        raise ValueError(f"read {i} of {lengths[i]} bytes at {offsets[i]} is negative or too large")


def copy_rows(source: Any, starts: Any, target: Any, places: Any, lengths: Any) -> None:
    array("source", source, BYTES, 1)
    array("target", target, BYTES, 1, writable=True)
    _together(starts=starts, places=places, lengths=lengths)
    _apart("target", target, starts=starts, places=places, lengths=lengths)
    fits = _fits(starts, lengths, len(source)) & _fits(places, lengths, len(target))
    for i in np.flatnonzero(~fits):
        raise ValueError(f"row {i} of {lengths[i]} bytes does not fit")


def reader(fd: Any, threads: Any) -> None:
    whole("fd", fd, 0, (1 << 31) - 1)
    whole("threads", threads, 0, MOST_THREADS)


def submit(offsets: Any, lengths: Any, memory: Any, destinations: Any) -> None:
    array("memory", memory, BYTES, 1, writable=True)
    _together(offsets=offsets, lengths=lengths, destinations=destinations)
    fits = _fits(offsets, lengths, MOST) & _fits(destinations, lengths, len(memory))
    for i in np.flatnonzero(~fits):
        raise ValueError(f"read {i} of {lengths[i]} bytes to {destinations[i]} does not fit")


# ---------------------------------------------------------------- kinds of arguments


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


def _word(name: str, value: Any, words: Collection[str]) -> None:
    """Accepts one of these words."""
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name} is {value!r}, not one of {', '.join(words)}")


def _cap(value: float) -> None:
    if not LEAST_CAP <= value <= MOST_CAP:
        raise ValueError(f"a cap of {value} is not within {LEAST_CAP} to {MOST_CAP}")


def _vector(name: str, value: Any, length: int) -> None:
    """Accepts a vector of ``length`` float32, or None."""
    if value is None:
        return
    array(name, value, FLOATS, 1)
    if len(value) != length:
        raise ValueError(f"{name} has {len(value)} values, not {length}")


def _row_bytes(format: Any, columns: int) -> int:
    if not isinstance(format, NumberFormat) or format is not FORMATS.get(format.name):
        raise ValueError(f"format is {format!r:.40}, not one of {', '.join(FORMATS)}")
    return format.row_bytes(columns)


def _rows(memory: Any, rows: Any, format: Any, columns: int) -> None:
    """Accepts rows of ``columns`` values that begin at the offsets ``rows`` of ``memory``."""
    array("memory", memory, BYTES, 1)
    array("rows", rows, INT64, 1)
    last = len(memory) - _row_bytes(format, columns)
    for i in np.flatnonzero((rows < 0) | (rows > last)):
        raise ValueError(f"row {i} at byte {rows[i]} is outside the {len(memory)} bytes")


def _pairs(indptr: Any, tokens: Any, n_rows: int, n_tokens: int) -> None:
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


def _together(**arrays: Any) -> None:
    """Accepts vectors of int64 of equal length."""
    for name, value in arrays.items():
        array(name, value, INT64, 1)
    if len({len(value) for value in arrays.values()}) > 1:
        raise ValueError(", ".join(f"{len(value)} {name}" for name, value in arrays.items()))


def _apart(name: str, written: AnyArray, **others: AnyArray | None) -> None:
    """Accepts an array to write that shares no memory with the others, which are read."""
    for other, value in others.items():
        if value is not None and np.may_share_memory(written, value):
            raise ValueError(f"{name} and {other} share memory")


def _fits(begins: Int64Array, lengths: Int64Array, size: int) -> BoolArray:
    """Whether each of these ranges lies within ``size`` bytes."""
    return (begins >= 0) & (lengths >= 0) & (begins <= size) & (lengths <= size - begins)
