"""Checks of the kernels' arguments: one function per kernel, a door that sound arguments pass.

A door takes whatever the kernel was called with, and raises ValueError where that does not fit. A
NumPy twin calls its door first. A compiled twin checks the same in C, and calls the door for the
message, so that both refuse the same arguments in the same words.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np

from flashinfer.kernels.activations import ACTIVATIONS
from flashinfer.kernels.arguments import (
    BYTES,
    DOUBLES,
    FLOATS,
    INT32,
    INT64,
    KEYS,
    LARGEST,
    MOST,
    apart,
    array,
    cached_width,
    csr_pairs,
    inside,
    number,
    row_bytes,
    rows_inside,
    soft_cap,
    switch,
    together,
    vector,
    whole,
    word,
)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

MOST_THREADS = 1024
SCORINGS = ("softmax", "sigmoid")  # of a mixture's router
GROUP_SCORES = ("top2", "max")


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


def linear(x: Any, weight: Any, bias: Any = None, rounded: Any = False) -> None:
    array("x", x, FLOATS, 2)
    array("weight.data", weight.data, BYTES, 2)
    if x.shape[1] != weight.columns:
        raise ValueError(f"x is {x.shape}, weight ({len(weight.data)}, {weight.columns})")
    width = row_bytes(weight.format, weight.columns)
    if weight.data.shape[1] != width:
        raise ValueError(
            f"weight's rows have {weight.data.shape[1]} bytes; {weight.columns} values of "
            f"{weight.format.name} have {width}"
        )
    vector("bias", bias, len(weight.data))
    switch("rounded", rounded)


def sparse_up(
    memory: Any,
    rows: Any,
    format: Any,
    x: Any,
    bias: Any = None,
    indptr: Any = None,
    tokens: Any = None,
    rounded: Any = False,
) -> None:
    array("x", x, FLOATS, 2)
    rows_inside(memory, rows, format, x.shape[1])
    csr_pairs(indptr, tokens, len(rows), len(x))
    vector("bias", bias, len(rows))
    switch("rounded", rounded)


def sparse_down(
    memory: Any, rows: Any, format: Any, a: Any, y: Any, indptr: Any = None, tokens: Any = None
) -> None:
    array("y", y, FLOATS, 2, writable=True)
    rows_inside(memory, rows, format, y.shape[1])
    csr_pairs(indptr, tokens, len(rows), len(y))
    array("a", a, FLOATS, 2 if indptr is None else 1)
    shape = (len(rows), len(y)) if indptr is None else (len(tokens),)
    if a.shape != shape:
        raise ValueError(f"a is {a.shape}, not {shape}")
    apart("y", y, memory=memory, rows=rows, a=a, indptr=indptr, tokens=tokens)


def activate(x: Any, kind: Any, threshold: Any = 0.0) -> None:
    array("x", x, FLOATS, None, writable=True)
    word("kind", kind, ACTIVATIONS)
    number("threshold", threshold, -LARGEST)
    if kind == "cap":
        soft_cap(threshold)


def layer_norm(x: Any, weight: Any, bias: Any, epsilon: Any) -> None:
    array("x", x, FLOATS, 2)
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias must both be given, or neither")
    vector("weight", weight, x.shape[1])
    vector("bias", bias, x.shape[1])
    number("epsilon", epsilon, 0.0)


def rms_norm(x: Any, weight: Any, epsilon: Any) -> None:
    array("x", x, FLOATS, 2)
    vector("weight", weight, x.shape[1])
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
    both: Any = False,
) -> None:
    array("q", q, FLOATS, 3)
    array("keys", keys, KEYS, 3)
    array("values", values, KEYS, 3)
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"keys are {keys.dtype} {keys.shape}, values {values.dtype} {values.shape}"
        )
    tokens, heads, width = q.shape
    groups, context, _ = keys.shape
    if not groups or heads % groups or cached_width(keys) != width or width % 32:
        raise ValueError(
            f"q is {q.shape}, keys {keys.shape}: heads of a multiple of 32 values, of which "
            "equally many share each key, are needed"
        )
    whole("start", start, 0, context - tokens)
    if window is not None:
        whole("window", window, 1, MOST)
    number("cap", cap, 0.0)
    if cap:
        soft_cap(cap)
    if bias is not None:
        array("bias", bias, FLOATS, 2)
        if bias.shape != (heads, context):
            raise ValueError(f"bias is {bias.shape}, not ({heads}, {context})")
    vector("sinks", sinks, heads)
    if not isinstance(both, bool) or (both and window is not None):
        raise ValueError(f"both is {both!r}, not False, or True without a window")


def linear_attention(
    q: Any, k: Any, v: Any, decay: Any, rate: Any, state: Any, delta: Any = False
) -> None:
    for name, value in {"q": q, "k": k, "v": v}.items():
        array(name, value, FLOATS, 3)
    for name, value in {"decay": decay, "rate": rate}.items():
        array(name, value, FLOATS, 2)
    array("state", state, FLOATS, 3, writable=True)
    tokens, groups, n = q.shape
    heads, width = v.shape[1:]
    if k.shape != q.shape or len(v) != tokens or not groups or heads % groups:
        raise ValueError(
            f"q is {q.shape}, k {k.shape}, v {v.shape}: heads of v of which equally many share "
            "each head of q and k are needed"
        )
    if decay.shape != (tokens, heads) or rate.shape != decay.shape:
        raise ValueError(f"decay is {decay.shape}, rate {rate.shape}, not ({tokens}, {heads})")
    if state.shape != (heads, n, width):
        raise ValueError(f"state is {state.shape}, not ({heads}, {n}, {width})")
    switch("delta", delta)
    apart("state", state, q=q, k=k, v=v, decay=decay, rate=rate)


def remember(cache: Any, x: Any, start: Any) -> None:
    array("cache", cache, KEYS, 3, writable=True)
    array("x", x, FLOATS, 3)
    if cache.shape[0] != x.shape[1] or cached_width(cache) < x.shape[2]:
        raise ValueError(f"x is {x.shape}, the cache {cache.shape}")
    whole("start", start, 0, cache.shape[1] - len(x))
    apart("cache", cache, x=x)


def rotate(x: Any, cos: Any, sin: Any) -> None:
    array("x", x, FLOATS, 3, writable=True)
    array("cos", cos, FLOATS, 2)
    array("sin", sin, FLOATS, 2)
    if cos.shape != sin.shape or len(cos) != len(x) or 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(f"x is {x.shape}, cos {cos.shape}, sin {sin.shape}")
    apart("x", x, cos=cos, sin=sin)


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
    word("scoring", scoring, SCORINGS)
    word("group_by", group_by, GROUP_SCORES)
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
    vector("choice_bias", choice_bias, experts)


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
        apart(name, value, neurons=neurons, priority=priority, **others)


# ---------------------------------------------------------------- reads


def merge_reads(
    offsets: Any, lengths: Any, destinations: Any, gap_bytes: Any, most_bytes: Any, room: Any
) -> None:
    together(offsets=offsets, lengths=lengths, destinations=destinations)
    whole("gap_bytes", gap_bytes, -1, MOST)
    whole("most_bytes", most_bytes, 0, MOST)
    whole("room", room, 0, MOST)
    for i in np.flatnonzero(
        ~(inside(offsets, lengths, MOST) & inside(destinations, lengths, MOST))
    ):
        raise ValueError(f"read {i} of {lengths[i]} bytes at {offsets[i]} is negative or too large")


def copy_rows(source: Any, starts: Any, target: Any, places: Any, lengths: Any) -> None:
    array("source", source, BYTES, 1)
    array("target", target, BYTES, 1, writable=True)
    together(starts=starts, places=places, lengths=lengths)
    apart("target", target, starts=starts, places=places, lengths=lengths)
    fits = inside(starts, lengths, len(source)) & inside(places, lengths, len(target))
    for i in np.flatnonzero(~fits):
        raise ValueError(f"row {i} of {lengths[i]} bytes does not fit")


def reader(threads: Any) -> None:
    whole("threads", threads, 0, MOST_THREADS)


def submit(fd: Any, end: Any, offsets: Any, lengths: Any, memory: Any, destinations: Any) -> None:
    whole("fd", fd, 0, (1 << 31) - 1)
    whole("end", end, 0, MOST)
    array("memory", memory, BYTES, 1, writable=True)
    together(offsets=offsets, lengths=lengths, destinations=destinations)
    fits = inside(offsets, lengths, MOST) & inside(destinations, lengths, len(memory))
    for i in np.flatnonzero(~fits):
        raise ValueError(f"read {i} of {lengths[i]} bytes to {destinations[i]} does not fit")
