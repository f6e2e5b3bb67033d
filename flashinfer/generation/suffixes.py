"""A suffix array over token ids: where a text's end stood before, and what mostly followed it."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from flashinfer.formats.arrays import AnyArray, Int64Array

LONGEST = 8  # tokens of a text's end that are looked for
WIDTH = 4  # bytes of a token: big-endian, so that bytes compare as tokens do
END = (1 << 32) - 1  # between two texts
DEPTH = 64  # tokens by which suffixes are sorted, at least


def joined(texts: Iterable[Sequence[int]]) -> AnyArray:
    """Texts, given as token ids, one after the other, with END behind each (n,) uint32."""
    pieces = [np.array([*ids, END], dtype=np.uint32) for ids in texts]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint32)


def suffix_array(tokens: AnyArray) -> Int64Array:
    """Where the suffixes of tokens (n,) begin, sorted by their first DEPTH tokens or more (n,):
    by prefix doubling (Manber and Myers 1993)."""
    n = len(tokens)
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    order, length = np.argsort(rank, kind="stable"), 1
    while length < DEPTH:
        following = np.zeros(n, dtype=np.int64)  # 0: the text is at its end
        following[: max(0, n - length)] = rank[length:] + 1
        key = rank * (n + 1) + following
        order = np.argsort(key, kind="stable")
        changes = np.concatenate([[0], np.cumsum(np.diff(key[order]) != 0)])
        rank[order] = changes
        length *= 2
        if changes[-1] == n - 1:
            break
    return order


class SuffixIndex:
    """Looks texts up.

    tokens    bytes-like, WIDTH bytes a token
    suffixes  where each suffix begins, in tokens, sorted
    Neither is trusted: a look-up of wrong ones gives tokens that are useless.
    """

    def __init__(self, tokens: Any, suffixes: Sequence[int]) -> None:
        self.tokens, self.suffixes = tokens, suffixes

    @classmethod
    def of(cls, texts: Iterable[Sequence[int]]) -> "SuffixIndex":
        """The index of some texts."""
        tokens = joined(texts)
        return cls(tokens.astype(">u4").tobytes(), suffix_array(tokens).tolist())

    def longest(self, ids: Sequence[int]) -> tuple[int, range]:
        """(how many of the last tokens of ``ids`` stand there in a row, up to LONGEST; the numbers
        of the suffixes that begin with them)."""
        end = np.array(ids[-LONGEST:], dtype=">u4").tobytes()
        length, found = 0, range(0)
        low, high = 1, len(end) // WIDTH
        while low <= high:  # where k tokens stand in a row, fewer do
            middle = (low + high) // 2
            places = self._places(end[-WIDTH * middle :], range(len(self.suffixes)), 0)
            if places:
                length, found, low = middle, places, middle + 1
            else:
                high = middle - 1
        return length, found

    def following(self, places: range, length: int, vocab_size: int, n: int) -> list[int]:
        """The n tokens that most often follow the ``length`` tokens with which the suffixes
        numbered ``places`` begin; fewer where a text ends there."""
        tokens: list[int] = []
        while len(tokens) < n:
            # The suffixes are sorted: where most go on alike, so does the one in the middle.
            at = WIDTH * (self.suffixes[places[len(places) // 2]] + length)
            token = bytes(self.tokens[at : at + WIDTH])
            if len(token) < WIDTH or int.from_bytes(token, "big") >= vocab_size:
                break
            tokens.append(int.from_bytes(token, "big"))
            if len(places) > 1:
                places = self._places(token, places, length)
            length += 1
        return tokens

    def _places(self, begin: bytes, among: range, skipped: int) -> range:
        """Those of the suffixes numbered ``among``, which begin with the same ``skipped`` tokens,
        that go on with these."""
        tokens, size, skip = self.tokens, len(begin), WIDTH * skipped

        def beginning(suffix: int) -> bytes:
            at = WIDTH * suffix + skip
            return bytes(tokens[at : at + size])

        first = bisect_left(self.suffixes, begin, among.start, among.stop, key=beginning)
        return range(first, bisect_right(self.suffixes, begin, first, among.stop, key=beginning))


def agreement(texts: Sequence[Sequence[int]], vocab_size: int, held_out: int) -> tuple[float, int]:
    """How well texts name each other's tokens: one of ``held_out`` is left out of the index, and of
    each of its tokens, the first left out, the index says what comes.

    Returns (share that is right, how many tokens these are).
    """
    left_out = [ids for number, ids in enumerate(texts) if number % held_out == 0]
    index = SuffixIndex.of([ids for number, ids in enumerate(texts) if number % held_out])
    right = tokens = 0
    for ids in left_out:
        for at in range(1, len(ids)):
            length, places = index.longest(ids[max(0, at - LONGEST) : at])
            named = index.following(places, length, vocab_size, 1) if length else []
            right += named == [ids[at]]
            tokens += 1
    return right / max(1, tokens), tokens
