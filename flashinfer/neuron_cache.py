"""The window: which neurons of a layer are kept in DRAM, and where (paper section 3.3)."""

import numpy as np

from flashinfer import kernels

UNLIMITED = 1 << 60  # a window that nothing leaves: rows are kept until they are needed


class NeuronCache:
    """One layer's rows of bundles, exactly as they lie on flash.

    memory    uint8, flat, from ``aligned_bytes``: capacity rows of ``stride`` bytes
    capacity  rows allocated, once
    window    a neuron is kept while one of the last ``window`` tokens used it
    used      rows that hold neurons: the first ``used``
    hits, misses, guesses, right_guesses  counts of neurons, since the cache was made; a neuron
              read ahead and then used is a miss, and a right guess
    """

    def __init__(self, neurons, memory, stride, window):
        self.memory, self.stride, self.window = memory, stride, window or UNLIMITED
        self.capacity = min(neurons, len(memory) // stride)
        self.rows = memory[: self.capacity * stride].reshape(self.capacity, stride)
        self.used = 0
        self.slot_of = np.full(neurons, -1, dtype=np.int32)
        self.neuron_at = np.full(self.capacity, -1, dtype=np.int32)
        self.last_used = np.zeros(self.capacity, dtype=np.int64)
        self.guessed = np.empty(0, dtype=np.int32)  # read ahead, not yet asked for
        self.hits = self.misses = self.guesses = self.right_guesses = 0

    def place(self, neurons, token):
        """Give each neuron a row, at most ``capacity`` of them; drop what left the window.

        neurons (n,) int32 ascending, token: the number of the current one. Returns (slots (n,),
        misses): the rows, and the indices into ``neurons`` whose rows the caller must fill.
        """
        slots, misses = self._place(neurons, token)
        read = len(misses)
        if len(self.guessed):
            right = self.guessed[np.isin(self.guessed, neurons, assume_unique=True)]
            wrong = np.setdiff1d(self.guessed, right, assume_unique=True)
            self.last_used[self.slot_of[wrong]] = -UNLIMITED
            self.guesses += len(self.guessed)
            self.right_guesses += len(right)
            self.guessed = self.guessed[:0]
            read += len(right)
        self.hits += len(neurons) - read
        self.misses += read
        return slots, misses

    def place_ahead(self, neurons, token):
        """As ``place``, for neurons that the coming token will probably use.

        The caller fills the rows before the next ``place``, which then finds them; those that it
        is not asked for are dropped first.
        """
        held = self.slot_of[neurons] >= 0
        before = self.last_used[self.slot_of[neurons[held]]]
        slots, misses = self._place(neurons, token)
        self.last_used[slots[held]] = before  # a guess is no use
        self.guessed = neurons[misses]
        return slots, misses

    @property
    def guesses_pay(self):
        """Whether enough of what was read ahead was used."""
        return self.guesses < 64 or self.right_guesses > 0.5 * self.guesses

    def _place(self, neurons, token):
        slots, misses, moved_from, moved_to, self.used = kernels.place(
            neurons, token, self.window, self.slot_of, self.neuron_at, self.last_used, self.used
        )
        if len(moved_from):
            self.rows[moved_to] = self.rows[moved_from]
        return slots, misses

    def used_at(self, slots, tokens):
        """Say which token used these rows last, where it was not the current one."""
        self.last_used[slots] = tokens

    def forget(self, neurons):
        """Drop neurons whose rows could not be filled."""
        slots = self.slot_of[neurons]
        self.last_used[slots[slots >= 0]] = -UNLIMITED
        self.slot_of[neurons] = -1
