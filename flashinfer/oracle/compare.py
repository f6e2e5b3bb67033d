"""Judging another engine's trace: the first operation that is wrong.

Each operation is recomputed in float64 from what the other engine recorded before it (replay.py),
and what it recorded is compared with that in units of the noise that an honest engine may have.
The limit follows from the number of elements compared: of so many, one beyond it occurs by chance
in one of MILLION comparisons.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float64Array, Int64Array
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.oracle import routing
from flashinfer.oracle.arithmetic import Arithmetic
from flashinfer.oracle.known import F32, Known
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.oracle.recorded import Recorded, refuse_strangers
from flashinfer.oracle.replay import Replay, Unknown
from flashinfer.oracle.summary import sampled
from flashinfer.oracle.trace_file import MOMENTS, Trace
from flashinfer.transformer.values import Value, values_of

MILLION = 1e6
NOT_JUDGED = ("active", "predicted")  # they follow from values that are
SMALLEST = 2.0**-126  # float32 keeps fewer digits of what is smaller

Verdict = Literal["right", "wrong", "not recorded", "not judged"]


@dataclass(frozen=True)
class Operation:
    """What was found of one operation.

    name, layer, key  of its value; see transformer/values.py
    noise     the largest difference, in units of the expected noise; limit: what it may be
    mean      the differences' root mean square, in these units; mean_limit: what it may be
    ulp       the same difference in units in the last place of float32
    position, index  of that element: the token, and where in the token's value
    other, expected  what the other engine has there, and what replay gives
    share     of the elements that differ by more than the limit
    by_position  the largest difference of each token, in units of noise
    """

    name: str
    layer: int | None
    key: str
    verdict: Verdict
    noise: float = 0.0
    limit: float = 0.0
    mean: float = 0.0
    mean_limit: float = 0.0
    ulp: float = 0.0
    position: int = 0
    index: tuple[int, ...] = ()
    other: float = 0.0
    expected: float = 0.0
    share: float = 0.0
    by_position: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Comparison:
    """The verdict on a trace: its operations, in the order of execution.

    first  the first one that is wrong, or None
    """

    engine: str
    arithmetic: str
    replayed: bool
    positions: tuple[int, ...]
    operations: tuple[Operation, ...]

    @property
    def first(self) -> Operation | None:
        return next((o for o in self.operations if o.verdict == "wrong"), None)

    @property
    def judged(self) -> int:
        """How many operations were judged."""
        return sum(o.verdict in ("right", "wrong") for o in self.operations)

    def as_dict(self) -> dict[str, Any]:
        """What --json writes."""
        first = self.first
        return {
            "engine": self.engine,
            "arithmetic": self.arithmetic,
            "replayed": self.replayed,
            "conforms": first is None,
            "first_wrong": None if first is None else first.name,
            "positions": list(self.positions),
            "operations": [asdict(o) for o in self.operations],
        }


def limit_of(elements: int) -> float:
    """How many units of noise one of so many elements may be off by: normal ones are beyond it
    once in MILLION comparisons."""
    return math.sqrt(2 * math.log(2 * MILLION * max(1, elements)))


def mean_limit_of(tokens: int) -> float:
    """How many units of noise elements may be off by in root mean square.

    Those of one token may be off together, such as by the root of one norm; so tokens count. Of so
    many squares of normal numbers the mean is beyond it once in MILLION comparisons (Laurent and
    Massart 2000, lemma 1).
    """
    t = math.log(MILLION)
    return math.sqrt(1 + 2 * math.sqrt(t / tokens) + 2 * t / tokens)


def compare(
    weights: ModelWeights,
    trace: Trace,
    how: Arithmetic,
    replay: bool = True,
    progress: Progress = no_progress,
) -> Comparison:
    """Judge ``trace``, another engine's run of the model with these weights.

    how      Arithmetic of the engine
    replay   compute each operation from what the engine recorded; else the whole run from the
             tokens, as with a trace of summaries
    Raises FormatError where the trace is not one of this model, UserError where nothing in it can
    be judged.
    """
    values = values_of(weights.config, weights.naming)
    refuse_strangers(weights, trace, values)
    recorded = Recorded(trace, values)
    replay = replay and trace.summaries is None
    run = Replay(
        weights, recorded if replay else {}, trace.tokens, trace.positions, how, trace.context
    )
    operations: list[Operation] = []
    for number, value in enumerate(values):
        if value.layer is not None:
            run.forget(value.layer)
        with np.errstate(all="ignore"):  # a trace may hold NaN, and any float64
            found = _judge(run, trace, recorded, value)
        if found is None:
            # What follows a value that is not finite is not finite, either, and proves nothing.
            if all(operation.noise < math.inf for operation in operations):
                raise UserError(
                    f"{weights.path}: {value.name} of the reference is not finite: are all weights "
                    "and the trace's earlier values?"
                )
            found = Operation(value.name, value.layer, value.key, "not judged")
        operations.append(found)
        progress("compare", number + 1, len(values))
    comparison = Comparison(
        trace.engine, how.name, replay, tuple(trace.positions.tolist()), tuple(operations)
    )
    if not comparison.judged:
        raise UserError(f"{trace.path}: nothing in it can be judged")
    return comparison


def _judge(run: Replay, trace: Trace, recorded: Recorded, value: Value) -> Operation | None:
    """The Operation of a value; None: what it should be is not finite."""
    place, base = (value.layer, value.key), (value.name, value.layer, value.key)
    # Of choices a sample is kept in an order of the engine's own.
    sampled_choice = trace.summaries is not None and value.key in ("choices", "choice_weights")
    if value.key in NOT_JUDGED or sampled_choice:
        return Operation(*base, "not judged")
    if place not in recorded:
        return Operation(*base, "not recorded")
    try:
        if value.key == "choices":
            return _judge_choices(run, recorded[place], value)
        expected = run.compute(value.layer, value.key)
    except Unknown:
        return _judge_finite(trace, value, recorded[place])
    if not np.isfinite(expected.value).all():
        return None
    if trace.summaries is not None:
        return _judge_sample(trace, value, expected)
    other = np.asarray(recorded[place], dtype=np.float64)
    return judged(value, other, _like(expected, other), trace.positions)


def _judge_finite(trace: Trace, value: Value, other: AnyArray) -> Operation:
    """What cannot be computed has to be finite, at least."""
    if np.isfinite(other).all():
        return Operation(value.name, value.layer, value.key, "not judged")
    expected = np.where(np.isfinite(other), other, np.nan).astype(np.float64)
    units = np.where(np.isfinite(other), 0.0, np.inf)
    return _operation(value, other, Known(expected), units, trace.positions)


def _like(x: Known, array: AnyArray) -> Known:
    return x.reshape(*array.shape)


def judged(value: Value, other: Float64Array, expected: Known, positions: Int64Array) -> Operation:
    """What is to be said of ``other`` (T, ...), a value that should be ``expected``."""
    return _operation(value, other, expected, _units(other, expected), positions)


def _operation(
    value: Value, other: AnyArray, expected: Known, units: Float64Array, positions: Int64Array
) -> Operation:
    limit = limit_of(other.size)
    at = np.unravel_index(int(units.argmax()), units.shape)
    worst, theirs, ours = (float(a[at]) for a in (units, other, expected.value))
    flat = units.reshape(len(units), -1)
    # Tokens that are the same may be off together.
    distinct = min(
        len(np.unique(positions)), len(np.unique(expected.value.reshape(len(units), -1)[:, 0]))
    )
    mean, mean_limit = float(np.sqrt((units**2).mean())), mean_limit_of(distinct)
    return Operation(
        value.name, value.layer, value.key,
        "wrong" if worst > limit or mean > mean_limit else "right",
        noise=worst, limit=limit, mean=mean, mean_limit=mean_limit,
        ulp=_ulp(theirs, ours), position=int(positions[at[0]]),
        index=tuple(int(n) for n in at[1:]), other=theirs, expected=ours,
        share=float((units > limit).mean()), by_position=tuple(flat.max(axis=1).tolist()),
    )  # fmt: skip


def _units(other: Float64Array, expected: Known) -> Float64Array:
    """The differences in units of noise; infinite where ``other`` is not finite."""
    floor = np.maximum(np.abs(expected.value), SMALLEST) * F32
    with np.errstate(invalid="ignore"):
        units = np.abs(other - expected.value) / np.maximum(expected.spread, floor)
    return np.where(np.isfinite(units), units, np.inf)


def _ulp(other: float, expected: float) -> float:
    return abs(other - expected) / float(np.spacing(np.float32(max(abs(expected), SMALLEST))))


def _judge_sample(trace: Trace, value: Value, expected: Known) -> Operation:
    """By a summary: the elements of the sample, each as of a position."""
    shape = (len(trace.positions), *value.shape)
    listed, _ = (trace.summaries or {})[value.name]
    if math.prod(listed) != math.prod(shape):
        raise FormatError(f"{trace.path}: {value.name} has the shape {listed}, not {list(shape)}")
    where = sampled(value.name, math.prod(shape))
    sample = trace.summary(value.name, "sample")
    taken = Known(expected.value.reshape(-1)[where], expected.spread.reshape(-1)[where])
    rows = where // math.prod(value.shape)
    found = judged(value, sample, taken, trace.positions[rows])
    # Elements that are not finite are counted, wherever they are.
    counted = dict(zip(MOMENTS, trace.summary(value.name, "moments"), strict=True))
    if found.noise < math.inf and (counted["nan"] or counted["infinite"]):
        return replace(found, verdict="wrong", noise=math.inf, other=math.nan, ulp=math.inf)
    return found


def _judge_choices(run: Replay, chosen: AnyArray, value: Value) -> Operation | None:
    """A choice is wrong where an expert was chosen before one that is better beyond the noise;
    None: the router's logits are not finite."""
    theirs = np.asarray(chosen, dtype=np.int64)
    layer = value.layer or 0
    config, logits = run.config.layers[layer].ffn.router, run.of(layer, "router")
    assert config is not None
    if not np.isfinite(logits.value).all():
        return None
    bias = run.weights.get(f"layers.{layer}.router.choice_bias")
    choice = routing.choose(config, logits, bias)
    margins = routing.margins(choice, theirs)
    row, limit = int(margins.argmax()), limit_of(choice.values.value.size)
    return Operation(
        value.name, value.layer, value.key, "wrong" if margins[row] > limit else "right",
        noise=float(margins[row]), limit=limit, position=int(run.positions[row]),
        other=float(theirs[row][0]), expected=float(choice.experts[row][0]),
        share=float((margins > limit).mean()), by_position=tuple(margins.tolist()),
    )  # fmt: skip
