"""Which neurons of a layer are kept in DRAM, and where (paper section 3.3).

Of a mixture of experts each "neuron" here is one expert: the unit that is read and kept as one.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from flashinfer import kernels
from flashinfer.formats.arrays import BoolArray, Float64Array, Int32Array, Int64Array, UInt8Array
from flashinfer.paper.selection import Selection

NEVER = -(1 << 60)  # used by no token: left every window

# What makes room when slots are short. "window" is the paper's: a neuron leaves when the last K
# tokens did not use it. "lru" fills the budget instead, and the least lately used leaves first.
# "frecency" also weighs how often: each use counts, half as much for every HALF_LIFE tokens since.
Policy = Literal["frecency", "lru", "window"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
HALF_LIFE = 16.0
NONE = np.empty(0, dtype=np.int32)
MOST_DOUBLINGS = 512  # a float64 has room for 1023: for a prompt and for sums of uses, too


BOOKKEEPING = 25  # bytes of a unit: its slot, its priority, and what its slot says of it


def default_policy(window: int | None) -> Policy:
    """The policy where none is named: a window that is asked for means the paper's."""
    return "window" if window else "frecency"


class NeuronCache:
    """One layer's slots, which hold bundles exactly as they lie on flash.

    memory    uint8, flat, from ``aligned_bytes``: capacity slots of ``slot_bytes`` bytes
    capacity  slots, allocated once
    policy    one of POLICIES
    window    a neuron is kept while one of the last ``window`` tokens used it; None: no limit
    borrowed  other layers use the same memory: ``empty`` it before each use
    used      slots that hold neurons: the first ``used``
    hits, misses, guesses, right_guesses  counts of neurons, since the cache was made; a neuron
              prefetched and then used is a miss, and a right guess
    """

    def __init__(
        self,
        neurons: int,
        memory: UInt8Array,
        slot_bytes: int,
        policy: Policy,
        window: int | None = None,
        borrowed: bool = False,
    ) -> None:
        self.borrowed = borrowed
        self.memory, self.slot_bytes, self.window = memory, slot_bytes, window
        self.capacity = min(neurons, len(memory) // slot_bytes)
        self.slots = memory[: self.capacity * slot_bytes].reshape(self.capacity, slot_bytes)
        self.used = 0
        self.slot_of = np.full(neurons, -1, dtype=np.int32)
        self.neuron_at = np.full(self.capacity, -1, dtype=np.int32)
        self.last_used = np.zeros(self.capacity, dtype=np.int64)
        self.priority = Priority(neurons, policy)
        self.guessed = NONE  # prefetched, not yet asked for
        self.marked = np.zeros(neurons, dtype=bool)  # a scratch pad, all False between calls
        self.hits = self.misses = self.guesses = self.right_guesses = 0

    def empty(self) -> None:
        """Forget what the slots hold."""
        self.slot_of[:], self.neuron_at[:], self.used, self.guessed = -1, -1, 0, NONE
        self.marked[:] = False

    def place(self, neurons: Int32Array, token: int) -> tuple[Int32Array, Int32Array, BoolArray]:
        """Give each neuron a slot, at most ``capacity`` of them; drop what left the window.

        neurons (n,) int32 ascending, token: the number of the current one. Returns (slots (n,),
        misses, early (n,) bool): the indices into ``neurons`` whose slots the caller must fill, and
        which of the others are being prefetched.
        """
        guessed, self.guessed = self.guessed, NONE
        self.marked[guessed] = True
        early = self.marked[neurons]
        self.marked[neurons] = False
        wrong = guessed[self.marked[guessed]]
        self.marked[wrong] = False
        values = self.priority.values
        if len(wrong):  # their slots may still be being filled: nobody else's yet
            values = values.copy()
            values[wrong] = np.inf
        slots, misses = self._place(neurons, token, values)
        if self.window is not None:  # no token uses the wrong: with the next one they leave
            theirs = self.slot_of[wrong]
            self.last_used[theirs[theirs >= 0]] = NEVER
        right = len(guessed) - len(wrong)
        self.guesses += len(guessed)
        self.right_guesses += right
        self.hits += len(neurons) - len(misses) - right
        self.misses += len(misses) + right
        return slots, misses, early

    def leaves_guesses(self, neurons: Int32Array) -> bool:
        """Whether ``place`` of these would leave the slots alone that are being prefetched into."""
        room = len(neurons) + len(self.guessed) <= self.capacity
        return room and self.window is None

    def place_prefetched(
        self, neurons: Int32Array, kept: Int32Array, token: int
    ) -> tuple[Int32Array, Int32Array]:
        """As ``place``, for neurons that the coming token will probably use; returns (those not
        here, their slots). Avoids evicting ``kept`` while capacity allows.

        The caller fills the slots before the next ``place``, unless that ``leaves_guesses``, and
        before they are used. Of a window those that no token uses are dropped then.
        """
        if kept is not neurons:
            union = np.union1d(neurons, kept[self.slot_of[kept] >= 0])
            neurons = union if len(union) <= self.capacity else neurons
        held = neurons[self.slot_of[neurons] >= 0] if self.window is not None else NONE
        uses = self.last_used[self.slot_of[held]]
        slots, misses = self._place(neurons, token, self.priority.values)
        self.last_used[self.slot_of[held]] = uses  # a guess is no use
        self.guessed = neurons[misses]
        return self.guessed, slots[misses]

    @property
    def guesses_pay(self) -> bool:
        """Whether enough of what was prefetched was used."""
        return self.guesses < 64 or self.right_guesses > 0.5 * self.guesses

    def _place(
        self, neurons: Int32Array, token: int, values: Float64Array
    ) -> tuple[Int32Array, Int32Array]:
        slots, misses, moved_from, moved_to, self.used = kernels.place(
            neurons, token, self.window, self.slot_of, self.neuron_at, self.last_used, values,
            self.used,
        )  # fmt: skip
        if len(moved_from):
            self.slots[moved_to] = self.slots[moved_from]
        return slots, misses

    def affords(self, neurons: Int32Array) -> BoolArray:
        """Which of these belong to the ``capacity`` of most priority, with those held: bool."""
        values = self.priority.values
        others = np.setdiff1d(self.neuron_at[: self.used], neurons, assume_unique=True)
        worth = np.concatenate([values[neurons], values[others]])
        if len(worth) <= self.capacity:
            return np.ones(len(neurons), dtype=bool)
        chosen = np.argpartition(-worth, self.capacity - 1)[: self.capacity]
        return np.isin(np.arange(len(neurons)), chosen)

    def last_uses(self, neurons: Int32Array) -> Int64Array:
        """Which token used each of these last, as the window counts it (n,); NEVER where it is not
        in the cache."""
        slots = self.slot_of[neurons]
        return np.where(slots >= 0, self.last_used[slots], NEVER)

    def restore_uses(self, neurons: Int32Array, tokens: Int64Array) -> None:
        """Let these tokens (n,) be the last ones that used the neurons, where they are held."""
        slots = self.slot_of[neurons]
        self.last_used[slots[slots >= 0]] = tokens[slots >= 0]

    def used_at(self, slots: Int32Array, token: int, last: Int32Array) -> None:
        """Which token used these slots last, counted from ``token`` on: (n,) each."""
        if self.window is not None:
            self.last_used[slots] = token + last


class Priority:
    """What each neuron of a layer, in the cache or not, is worth keeping: ``values`` (neurons,).

    A use by token t adds 2^(t / H): H tokens later a use counts twice as much. So a value changes
    only when its neuron is used, and when all are scaled down, before they overflow. Without
    weighing a value is the number of the last use, from 1 on. 0: never used.
    """

    def __init__(self, neurons: int, policy: Policy) -> None:
        self.half_life = HALF_LIFE if policy == "frecency" else 0.0
        self.values = np.zeros(neurons)
        self.begin = 0  # the token whose use counts 1

    def expect(self, uses: ArrayLike) -> None:
        """Before the first token: units are used at these shares of the tokens (units,)."""
        # Of a sum over a long past of uses at such a share; without weighing, an order is enough.
        self.values[:] = np.asarray(uses) * max(1.0, self.half_life)

    def note(self, selection: Selection, token: int) -> None:
        """The neurons of a Selection were used, by tokens numbered from ``token`` on."""
        neurons = selection.units
        if not self.half_life:
            self.values[neurons] = token + selection.last + 1
            return
        count = self._count(token)
        if selection.indptr is None:
            self.values[neurons] += count
        elif len(neurons):
            later = np.exp2(selection.tokens / self.half_life)
            self.values[neurons] += count * np.add.reduceat(later, selection.indptr[:-1])

    def _count(self, token: int) -> float:
        """What a use by this token adds."""
        while (doublings := (token - self.begin) / self.half_life) > MOST_DOUBLINGS:
            self.values *= 2.0**-MOST_DOUBLINGS
            self.begin += int(MOST_DOUBLINGS * self.half_life)
        return 2.0**doublings
