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
# Where not all that a token uses can stay, a use by the last token counts so many times as much.
LAST_USE = 8.0
NONE = np.empty(0, dtype=np.int32)
MOST_DOUBLINGS = 512  # a float64 has room for 1023: for a prompt and for sums of uses, too


BOOKKEEPING = 25  # bytes of a unit: its slot, its priority, and what its slot says of it


def default_policy(window: int | None) -> Policy:
    """The policy where none is named: a window that is asked for means the paper's."""
    return "window" if window else "frecency"


class NeuronCache:
    """One layer's slots, which hold bundles exactly as they lie on flash.

    memory    uint8, flat, from ``aligned_bytes``, which other layers use, too
    own       the slice of memory where the layer's slots lie, of ``slot_bytes`` bytes each
    passing   the slice of memory that all layers use in turn: slots for units that are computed and
              not kept
    policy    one of POLICIES
    window    a neuron is kept while one of the last ``window`` tokens used it; None: no limit
    capacity  slots of its own; transit: those behind them, for what passes through
    starts    (capacity + transit,) int64: where in memory each slot begins
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
        own: slice = slice(None),
        passing: slice = slice(0),
    ) -> None:
        self.memory, self.slot_bytes, self.window = memory, slot_bytes, window
        begin, end, _ = own.indices(len(memory))
        first, stop, _ = passing.indices(len(memory))
        self.capacity = min(neurons, (end - begin) // slot_bytes)
        self.transit = (stop - first) // slot_bytes
        starts = [begin + slot_bytes * np.arange(self.capacity, dtype=np.int64)]
        starts += [first + slot_bytes * np.arange(self.transit, dtype=np.int64)]
        self.starts = np.concatenate(starts)
        held = memory[begin : begin + self.capacity * slot_bytes]
        self.slots = held.reshape(self.capacity, slot_bytes)
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
        early, wrong = self._judge_guesses(neurons)
        values = self.priority.values
        if len(wrong):  # their slots may still be being filled: nobody else's yet
            values = values.copy()
            values[wrong] = np.inf
        slots, misses = self._place(neurons, token, values)
        self._forget(wrong)
        self.hits += len(neurons) - len(misses)
        self.misses += len(misses)
        return slots, misses, early

    def begin_waves(self, neurons: Int32Array, token: int) -> None:
        """Before these neurons are placed by ``place_wave``, and once no read is in flight: drops
        what left the window, so that afterwards no slot moves."""
        _, wrong = self._judge_guesses(neurons)
        self._forget(wrong)
        self._place(NONE, token, self.priority.values)

    def place_wave(
        self, wave: Int32Array, busy: Int32Array, coming: Int32Array, token: int
    ) -> tuple[Int32Array, Int32Array]:
        """As ``place``, for some of the neurons that a token uses, which need not fit together.

        wave          (n,) int32 ascending
        busy, coming  others that the token uses: being read or computed, and those to be placed
                      after this wave. None of either is evicted; without transit slots, of those
                      coming, as far as the capacity allows.
        Returns (slots (n,), misses). Where there are transit slots, a neuron is admitted only if it
        is worth more than what it would push out; else its slot is -1: the caller gives it one in
        transit. Without any all are admitted, and must fit beside the ``busy``.
        """
        here = self.slot_of[wave] >= 0
        worth, missing = self.priority.worth(), wave[~here]
        kept = self._held(np.concatenate([busy, coming]))
        if not self.transit and len(kept) + len(wave) > self.capacity:
            kept = self._held(busy)
        kept = np.concatenate([kept, wave[here]])
        admitted = self._worth_more(missing, kept, worth) if self.transit else missing
        self._place(np.sort(np.concatenate([kept, admitted])), token, worth)
        self.hits += len(wave) - len(missing)
        self.misses += len(missing)
        return self.slot_of[wave], np.flatnonzero(~here).astype(np.int32)

    def _held(self, neurons: Int32Array) -> Int32Array:
        """Those of these neurons that have slots."""
        return neurons[self.slot_of[neurons] >= 0]

    def _worth_more(self, missing: Int32Array, kept: Int32Array, worth: Float64Array) -> Int32Array:
        """Of these neurons those that take unused slots, the worthiest first, and then those that
        are worth more than what they push out, which is none of ``kept``."""
        missing = missing[np.argsort(-worth[missing], kind="stable")]
        unused = self.capacity - self.used
        others = np.setdiff1d(self.neuron_at[: self.used], kept, assume_unique=True)
        falling, rising = worth[missing[unused:]], np.sort(worth[others])
        n = min(len(falling), len(rising))
        return missing[: unused + np.count_nonzero(falling[:n] > rising[:n])]

    def _judge_guesses(self, neurons: Int32Array) -> tuple[BoolArray, Int32Array]:
        """(which of these neurons were prefetched (n,) bool, those that were and are not needed);
        counts both."""
        guessed, self.guessed = self.guessed, NONE
        self.marked[guessed] = True
        early = self.marked[neurons]
        self.marked[neurons] = False
        wrong = guessed[self.marked[guessed]]
        self.marked[wrong] = False
        right = len(guessed) - len(wrong)
        self.guesses += len(guessed)
        self.right_guesses += right
        self.hits -= right  # they have slots, and yet had to be read
        self.misses += right
        return early, wrong

    def _forget(self, wrong: Int32Array) -> None:
        """Of a window: no token uses these, with the next one they leave."""
        if self.window is not None:
            self.last_used[self.slot_of[self._held(wrong)]] = NEVER

    def leaves_guesses(self, neurons: Int32Array) -> bool:
        """Whether ``place`` of these would leave the slots alone that are being prefetched into."""
        together = len(np.union1d(neurons, self.guessed))
        return together <= self.capacity and self.window is None

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
        found, slots = np.full(len(neurons), NEVER), self.slot_of[neurons]
        found[slots >= 0] = self.last_used[slots[slots >= 0]]
        return found

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
        self.last_use = LAST_USE
        self.values = np.zeros(neurons)
        self.begin = 0  # the token whose use counts 1
        self.noted: tuple[Selection, int] | None = None  # what ``note`` was given last

    def expect(self, uses: ArrayLike) -> None:
        """Before the first token: units are used at these shares of the tokens (units,)."""
        # Of a sum over a long past of uses at such a share; without weighing, an order is enough.
        self.values[:] = np.asarray(uses) * max(1.0, self.half_life)

    def note(self, selection: Selection, token: int) -> None:
        """The neurons of a Selection were used, by tokens numbered from ``token`` on."""
        neurons, self.noted = selection.units, (selection, token)
        if not self.half_life:
            self.values[neurons] = token + selection.last + 1
            return
        count = self._count(token)
        if selection.indptr is None:
            self.values[neurons] += count
        elif len(neurons):
            later = np.exp2(selection.tokens / self.half_life)
            self.values[neurons] += count * np.add.reduceat(later, selection.indptr[:-1])

    def worth(self) -> Float64Array:
        """``values`` to compare neurons by where the last token's do not all fit (neurons,).

        Of what the last token used the next uses more than of anything else, and first of all what
        a router gave much weight. So such a use counts LAST_USE times as much again, shared among
        the last token's neurons by their weights. Without weighing: ``values``.
        """
        if self.noted is None or not self.half_life:
            return self.values
        (selection, token), worth = self.noted, self.values.copy()
        if len(selection.units):
            t = int(selection.last.max())
            lasting = np.flatnonzero(selection.last == t)
            shares = np.ones(len(lasting))
            if selection.weights is not None:
                pairs = lasting if selection.indptr is None else selection.indptr[lasting + 1] - 1
                weights = selection.weights[pairs].astype(np.float64)
                if 0 < (total := weights.sum()) < np.inf:
                    shares = weights * (len(weights) / total)
            worth[selection.units[lasting]] += self.last_use * self._count(token + t) * shares
        return worth

    def _count(self, token: int) -> float:
        """What a use by this token adds."""
        while (doublings := (token - self.begin) / self.half_life) > MOST_DOUBLINGS:
            self.values *= 2.0**-MOST_DOUBLINGS
            self.begin += int(MOST_DOUBLINGS * self.half_life)
        return 2.0**doublings
