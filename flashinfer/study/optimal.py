"""The cache that knows the future (Belady 1966): no cache can miss less, and none can be built."""

from collections.abc import Sequence

import numpy as np

from flashinfer.formats.arrays import BoolArray, Float64Array, Int64Array
from flashinfer.paper.neuron_cache import Priority
from flashinfer.paper.selection import Selection

NEVER = 1 << 40  # the token that uses what no token uses any more


def next_use(uses: BoolArray, now: int) -> Int64Array:
    """The first token after ``now`` that uses each unit, NEVER where none does: uses (T, units)
    bool -> (units,)."""
    coming = uses[now + 1 :]
    if not len(coming):
        return np.full(uses.shape[1], NEVER)
    return np.where(coming.any(axis=0), now + 1 + coming.argmax(axis=0), NEVER)


class Recorded(Priority):
    """The priority that is there anyway, which notes what tokens use: ``trace``."""

    def __init__(self, neurons: int) -> None:
        super().__init__(neurons, "frecency")
        self.trace: list[Selection] = []

    def note(self, selection: Selection, token: int) -> None:
        """These units are used."""
        self.trace.append(selection)
        super().note(selection, token)

    @property
    def uses(self) -> BoolArray:
        """Which token used which unit, (T, units)."""
        uses = np.zeros((len(self.trace), len(self.values)), dtype=bool)
        for token, selection in enumerate(self.trace):
            uses[token, selection.units] = True
        return uses


class Future(Priority):
    """Units are worth the more, the sooner they are used again.

    uses  (T, units) bool: of the text that is to come, which token uses which unit
    """

    def __init__(self, uses: BoolArray) -> None:
        super().__init__(uses.shape[1], "lru")
        self.uses = uses

    def worth_after(self, now: int) -> Float64Array:
        """What each unit is worth keeping when token ``now`` is computed (units,)."""
        return -next_use(self.uses, now).astype(np.float64)

    def note(self, selection: Selection, token: int) -> None:
        """Token ``token`` has come."""
        self.values[:] = self.worth_after(token)


def optimal_misses(
    trace: Sequence[Selection], units: int, capacity: int, warm: int | None = None
) -> float:
    """Units that the cache of ``capacity`` units misses a token, which knows what comes.

    trace  what each token uses
    warm   the token from which on misses count; None: in the trace's second half
    """
    warm = len(trace) // 2 if warm is None else warm
    following, coming = np.full(units, NEVER), []
    for token in range(len(trace) - 1, -1, -1):
        coming.append(following[trace[token].units])
        following[trace[token].units] = token
    held, next_use, count = np.zeros(units, dtype=bool), np.full(units, NEVER), 0
    for token, selection in enumerate(trace):
        used = selection.units
        if token >= warm:
            count += int(np.count_nonzero(~held[used]))
        held[used], next_use[used] = True, coming.pop()
        excess = np.count_nonzero(held) - capacity
        if excess > 0:
            there = np.flatnonzero(held)
            held[there[np.argpartition(-next_use[there], excess - 1)[:excess]]] = False
    return count / (len(trace) - warm)
