"""Which value alone explains a difference, and whether two traces have the same bits."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flashinfer.formats.arrays import AnyArray
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.oracle.arithmetic import Arithmetic
from flashinfer.oracle.compare import Operation, judged
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.oracle.recorded import Recorded, refuse_strangers
from flashinfer.oracle.replay import Place, Replay, Unknown
from flashinfer.oracle.trace_file import Trace
from flashinfer.transformer.values import values_of


@dataclass(frozen=True)
class Replacement:
    """Whether one value alone explains what another engine's last value differs by.

    names        of the values that were taken from the other engine
    before, after  the Operation of the last value, of a run of ours from the tokens on, and of one
                 that goes on from the other engine's values instead
    """

    names: tuple[str, ...]
    before: Operation
    after: Operation

    @property
    def explains(self) -> bool:
        """Whether the difference is gone."""
        return self.before.verdict == "wrong" and self.after.verdict == "right"


def replace_values(
    weights: ModelWeights, trace: Trace, how: Arithmetic, patterns: Sequence[str]
) -> Replacement:
    """Run the model from the tokens on, with the other engine's values where a name matches one of
    ``patterns`` (fnmatch, also of a name's end), and judge the logits that it recorded.

    Raises UserError where no value matches, or the trace has no logits.
    """
    values = values_of(weights.config, weights.naming)
    refuse_strangers(weights, trace, values)
    if trace.summaries is not None:
        raise UserError(f"{trace.path}: holds summaries; replacing needs the values themselves")
    recorded = Recorded(trace, values)
    chosen = [
        value
        for value in recorded.by_place.values()
        if any(fnmatch.fnmatchcase(value.name, p) or value.name.endswith(f".{p}") for p in patterns)
    ]
    last = recorded.by_place.get((None, "logits"))
    if not chosen or last is None:
        what = "logits" if chosen else f"value called {', '.join(patterns)}"
        raise UserError(f"{trace.path}: has no {what}")
    taken = {(value.layer, value.key): recorded[value.layer, value.key] for value in chosen}
    other = np.asarray(recorded[None, "logits"], dtype=np.float64)
    found = []
    nothing: Mapping[Place, AnyArray] = {}
    for given in (nothing, taken):
        run = Replay(weights, given, trace.tokens, trace.positions, how, trace.context)
        try:
            with np.errstate(all="ignore"):  # a trace may hold NaN, and any float64
                logits = run.compute(None, "logits")
                found.append(judged(last, other, logits, trace.positions))
        except Unknown:
            raise UserError(f"{trace.path}: replacing needs all positions of the text") from None
    return Replacement(tuple(value.name for value in chosen), *found)


def first_difference(reference: Trace, other: Trace) -> tuple[str, int] | None:
    """The first value, in the reference's order, whose bits differ, and how many differ in all;
    None where both traces hold the same. Either may hold summaries.

    Raises FormatError where they are not of the same tokens, or share no values.
    """
    for of_one, of_other, what in (
        (reference.tokens, other.tokens, "tokens"),
        (reference.positions, other.positions, "positions"),
    ):
        if not np.array_equal(of_one, of_other):
            raise FormatError(f"{other.path}: is a trace of other {what} than {reference.path}")
    held = set(other.names)
    shared = [name for name in reference.names if name in held]
    if not shared:
        raise FormatError(f"{other.path}: shares no value with {reference.path}")
    different = [name for name in shared if reference.digest(name) != other.digest(name)]
    return (different[0], len(different)) if different else None
