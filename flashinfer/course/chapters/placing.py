"""Chapter 2: place neurons in slots, with a window."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashinfer import kernels
from flashinfer.course.engine import opened, run, text
from flashinfer.course.lesson import Answer, Grade, in_place_of, shown
from flashinfer.formats.arrays import Float64Array, Int32Array, Int64Array
from flashinfer.kernels.neuron_cache import place as explained

TITLE = "place neurons with a window"
ENGINE = "flashinfer/kernels/neuron_cache.py: place"
WINDOW = 4
Placed = tuple[Int32Array, Int32Array, Int32Array, Int32Array, int]


def place(
    neurons: Int32Array,
    token: int,
    window: int | None,
    slot_of: Int32Array,
    neuron_at: Int32Array,
    last_used: Int64Array,
    priority: Float64Array,
    used: int,
) -> Placed:
    """Give each of a token's neurons a slot of the layer's cache.

    neurons    (n,) ascending: the neurons that this token uses
    token      the token's number
    window     a neuron stays while one of the last ``window`` tokens used it, this one included,
               and leaves then; None: none leaves before its slot is needed
    slot_of    (d_ffn,): the slot that holds each neuron, or -1
    neuron_at  (capacity,): the neuron that each slot holds, or -1
    last_used  (capacity,): the token that used each slot last
    priority   (d_ffn,): where slots are short even so, the neurons of least priority leave, and
               never one that this token uses
    used       slots 0 to used - 1 hold neurons, and no others do, before the call and after it

    Change slot_of, neuron_at and last_used in place. Return five things:
    slots       (n,) the slot of each of ``neurons``
    misses      the indices into ``neurons`` of those that were in no slot, ascending: the engine
                reads them
    moved_from  where slots must close a gap, their bytes are copied from these slots ...
    moved_to    ... to these, before anything is read
    used        how many slots hold neurons now
    """
    return explained(neurons, token, window, slot_of, neuron_at, last_used, priority, used)


solution = place


@dataclass
class State:
    """A layer's cache, as ``place`` sees it."""

    slot_of: Int32Array
    neuron_at: Int32Array
    last_used: Int64Array
    used: int = 0

    @classmethod
    def empty(cls, neurons: int, capacity: int) -> "State":
        return cls(
            np.full(neurons, -1, dtype=np.int32),
            np.full(capacity, -1, dtype=np.int32),
            np.zeros(capacity, dtype=np.int64),
        )

    def held(self) -> set[int]:
        return set(self.neuron_at[: self.used].tolist())


def examples(answer: Answer) -> None:
    """Layers of a few neurons, their caches as small as a token allows."""
    random = np.random.default_rng(0)
    for number in range(150):
        units = int(random.integers(2, 9))
        most = int(random.integers(1, units + 1))
        state = State.empty(units, int(random.integers(most, units + 1)))
        contents = np.full(len(state.neuron_at), -1)
        window = None if number % 3 == 0 else int(random.integers(1, 4))
        for token in range(12):
            n = int(random.integers(0, most + 1))
            neurons = np.sort(random.choice(units, n, replace=False)).astype(np.int32)
            priority = random.permutation(units).astype(np.float64)
            arguments = (neurons, token, window, state.slot_of, state.neuron_at,
                         state.last_used, priority, state.used)  # fmt: skip
            slots, misses, moved_from, moved_to, _ = judged(answer, *arguments)
            state.used = int(np.count_nonzero(state.neuron_at >= 0))
            contents[moved_to] = contents[moved_from]
            contents[slots[misses]] = neurons[misses]
            _refuse_wrong_bytes(answer, state, contents)


def _refuse_wrong_bytes(answer: Answer, state: State, contents: Any) -> None:
    """After moves and reads a slot must have the bytes of the neuron that it is said to hold."""
    wrong = np.flatnonzero(contents[: state.used] != state.neuron_at[: state.used])
    if wrong.size:
        slot = int(wrong[0])
        raise answer.wrong(
            f"slot {slot} is said to hold neuron {state.neuron_at[slot]}, but after the moves and "
            f"the reads its bytes are those of neuron {contents[slot]}: a neuron that changes its "
            "slot must stand in moved_from and moved_to"
        )


def judged(
    answer: Answer,
    neurons: Int32Array,
    token: int,
    window: int | None,
    slot_of: Int32Array,
    neuron_at: Int32Array,
    last_used: Int64Array,
    priority: Float64Array,
    used: int,
) -> Placed:
    """What the answer gives; the arrays are changed as it changed them. Raises Wrong where they
    contradict each other, or neurons stay or leave that must not."""
    before = State(slot_of.copy(), neuron_at.copy(), last_used.copy(), used)
    case = (
        f"of a cache of {len(neuron_at)} slots that holds {shown(before.neuron_at[:used])}, last "
        f"used by tokens {shown(before.last_used[:used])}, token {token} uses neurons "
        f"{shown(neurons)}, window {window}: "
    )
    given = answer(
        neurons.copy(), token, window, slot_of, neuron_at, last_used, priority.copy(), used
    )
    if not isinstance(given, tuple) or len(given) != 5:
        raise answer.wrong(
            f"gave {shown(given)}; (slots, misses, moved_from, moved_to, used) is wanted"
        )
    names = ("slots", "misses", "moved_from", "moved_to")
    slots, misses, moved_from, moved_to = (
        answer.array(part, np.int32, name) for part, name in zip(given, names, strict=False)
    )
    after = State(slot_of, neuron_at, last_used, _whole(answer, given[4]))
    missing = np.flatnonzero(before.slot_of[neurons] < 0)
    if not np.array_equal(misses, missing):
        raise answer.wrong(f"{case}misses must be {shown(missing)}, not {shown(misses)}")
    _refuse_contradictions(answer, case, neurons, token, slots, after)
    for slot in (*moved_from.tolist(), *moved_to.tolist()):
        if not 0 <= slot < len(neuron_at):
            raise answer.wrong(f"{case}there is no slot {slot} to move to or from")
    if len(moved_from) != len(moved_to):
        raise answer.wrong(f"{case}moved_from and moved_to are not equally many")
    _refuse_wrong_ones(answer, case, neurons, token, window, priority, before, after)
    return slots, misses, moved_from, moved_to, after.used


def _whole(answer: Answer, used: Any) -> int:
    if not isinstance(used, (int, np.integer)):
        raise answer.wrong(f"used must be a whole number, not {shown(used)}")
    return int(used)


def _refuse_contradictions(
    answer: Answer, case: str, neurons: Int32Array, token: int, slots: Int32Array, after: State
) -> None:
    """slots, slot_of, neuron_at, last_used and used must say the same."""
    neuron_at = after.neuron_at
    if len(slots) != len(neurons) or not np.array_equal(slots, after.slot_of[neurons]):
        raise answer.wrong(
            f"{case}slots are {shown(slots)}, but slot_of says {shown(after.slot_of[neurons])}"
        )
    taken = np.flatnonzero(neuron_at >= 0)
    if not np.array_equal(taken, np.arange(after.used)):
        raise answer.wrong(
            f"{case}used is {after.used}, and neuron_at {shown(neuron_at)}: slots 0 to used - 1 "
            "must hold neurons, and no others"
        )
    expected = np.full(len(after.slot_of), -1)
    if (neuron_at >= len(expected)).any():
        raise answer.wrong(f"{case}neuron_at {shown(neuron_at)} names neurons that do not exist")
    expected[neuron_at[taken]] = taken
    if not np.array_equal(expected, after.slot_of):
        neuron = int(np.flatnonzero(expected != after.slot_of)[0])
        raise answer.wrong(
            f"{case}slot_of says that neuron {neuron} is in slot {after.slot_of[neuron]}, but "
            f"neuron_at is {shown(neuron_at)}"
        )
    if (after.slot_of[neurons] < 0).any():
        neuron = int(neurons[after.slot_of[neurons] < 0][0])
        raise answer.wrong(f"{case}neuron {neuron} got no slot")
    late = slots[after.last_used[slots] != token]
    if late.size:
        raise answer.wrong(
            f"{case}last_used[{late[0]}] must be {token}: this token uses the neuron there"
        )


def _refuse_wrong_ones(
    answer: Answer,
    case: str,
    neurons: Int32Array,
    token: int,
    window: int | None,
    priority: Float64Array,
    before: State,
    after: State,
) -> None:
    """Those stay that must, and those leave."""
    used_now, held = set(neurons.tolist()), after.held()
    last = {int(n): int(before.last_used[s]) for s, n in enumerate(before.neuron_at[: before.used])}
    within = {n for n, t in last.items() if window is None or t > token - window} - used_now
    for neuron in sorted(held - used_now - within):
        raise answer.wrong(
            f"{case}neuron {neuron}, last used by token {last.get(neuron)}, has left the window "
            "and must not stay"
        )
    for neuron in within & held:  # by its old slot's number, wherever it is now
        if after.last_used[after.slot_of[neuron]] != last[neuron]:
            raise answer.wrong(
                f"{case}neuron {neuron} was last used by token {last[neuron]}; last_used of its "
                f"slot says {after.last_used[after.slot_of[neuron]]}"
            )
    room = len(after.neuron_at) - len(used_now)
    left = within - held
    if len(held - used_now) < min(room, len(within)):
        raise answer.wrong(
            f"{case}neurons {sorted(left)} left although there was room for "
            f"{min(room, len(within))} of those within the window"
        )
    stay = held - used_now
    if left and stay and max(priority[list(left)]) > min(priority[list(stay)]):
        worth = {n: float(priority[n]) for n in sorted(within)}
        raise answer.wrong(
            f"{case}slots are short, and those of least priority must leave ({shown(worth)}); "
            f"neurons {sorted(left)} left"
        )


def grades(answer: Answer, progress: Callable[[float], None]) -> list[Grade]:
    """The demo model with a window, its slots given by the answer."""
    ids = text()
    with opened(window=WINDOW) as model:
        own = run(model, ids)
    with (
        in_place_of(kernels, "place", lambda *arguments: judged(answer, *arguments)),
        opened(window=WINDOW) as model,
    ):
        got = run(model, ids, progress)
    return [
        Grade("bits of the logits", got.digest, own.digest),
        Grade("reads a token", got.reads, own.reads, own.reads),
    ]
