"""Guesses of the tokens to come, which one pass of the model then checks (speculative decoding,
Leviathan et al. 2023; drafts from the text itself: prompt lookup, Saxena 2023)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from flashinfer.formats.arrays import Int32Array
from flashinfer.generation.sampling import Sampler
from flashinfer.generation.suffixes import LONGEST

# How often a drafted token is right, before it is known, by how many tokens of the text's end
# stood where it was found: of 1, 2, ... tokens.
EXPECTED = (0.25, 0.45, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)


class Draft(NamedTuple):
    """A guess of what comes next.

    most      tokens that it can give
    kind      drafts of one kind are right equally often: acceptance is measured by it
    expected  how often a token of this kind is right, before that was measured
    tokens    a function n -> the first n tokens (n at most ``most``)
    """

    most: int
    kind: str
    expected: float
    tokens: Callable[[int], list[int]]


class Drafter(Protocol):
    """Where drafts come from."""

    name: str

    def draft(self, ids: Sequence[int], most: int, sampler: Sampler) -> Draft | None:
        """The Draft of up to ``most`` tokens that follow the text ``ids``; None: there is none.

        sampler  that the tokens will be drawn with; it is left as it is
        """

    def seconds(self, tokens: int) -> float:
        """What drafting so many tokens takes."""


class NGrams:
    """Drafts what followed the last place in the text where its end stood before."""

    name = "ngram"

    def __init__(self, context: int) -> None:
        self.text: Int32Array = np.empty(context + 1, dtype=np.int32)
        self.known = 0  # tokens of the text that ``text`` holds

    def seconds(self, tokens: int) -> float:
        """Nothing worth counting."""
        return 0.0

    def draft(self, ids: Sequence[int], most: int, sampler: Sampler) -> Draft | None:
        """The Draft of up to ``most`` tokens; see Drafter."""
        text, n = self._as_array(ids), len(ids)
        found = np.flatnonzero(text[: n - 1] == text[n - 1])
        length = 1  # tokens of the end that stand at every place of ``found``
        while length < LONGEST and len(found):
            longer = found[found >= length]
            longer = longer[text[longer - length] == text[n - 1 - length]]
            if not len(longer):
                break
            found, length = longer, length + 1
        if not len(found):
            return None
        begin, kind = int(found[-1]) + 1, f"{self.name} {length}"
        return Draft(most, kind, EXPECTED[length - 1], partial(self._following, begin))

    def _following(self, begin: int, n: int) -> list[int]:
        """The n tokens from place ``begin`` of the text on; a text that repeats itself goes on."""
        tokens: list[int] = self.text[begin : min(self.known, begin + n)].tolist()
        while len(tokens) < n:
            tokens += tokens[: n - len(tokens)]
        return tokens

    def _as_array(self, ids: Sequence[int]) -> Int32Array:
        """The text (n,), of which nearly always only the last tokens are new."""
        n, known = len(ids), self.known
        if known > n or (known and self.text[known - 1] != ids[known - 1]):
            known = 0
        self.text[known:n] = ids[known:n]
        self.known = n
        return self.text[:n]
