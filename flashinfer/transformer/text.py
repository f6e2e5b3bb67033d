"""A text on its way through the model: its tokens, and what its layers keep of them."""

from collections.abc import Sequence
from typing import NamedTuple

from flashinfer.formats.arrays import Int64Array
from flashinfer.transformer.text_memory import TextMemory

MOST_IN_PASS = 1024  # tokens of one text that go through a layer together, at most


class Text:
    """The tokens processed, and each layer's memory of them.

    caches      the TextMemory of each layer
    ids         the tokens; incomplete: whether the caches lack some of them
    """

    def __init__(self, caches: Sequence[TextMemory]) -> None:
        self.caches = caches
        self.ids: list[int] = []
        self.incomplete = False

    @property
    def position(self) -> int:
        """How many tokens there are."""
        return len(self.ids)

    def holds(self, position: int) -> bool:
        """Whether a token at ``position`` finds all that it needs; where it does not, those before
        it must be processed again."""
        return not self.incomplete and all(cache.holds(position) for cache in self.caches)

    def settled(self, position: int) -> int:
        """The last token, up to ``position``, up to which a session's file can hold the caches; 0
        where they lack some that the next one needs."""
        if not self.holds(position):
            return 0
        return min(cache.settled(position) for cache in self.caches)

    def in_common(self, ids: Sequence[int]) -> int:
        """How many of its first tokens are those of ``ids``."""
        return in_common(self.ids, ids)

    def copy(self, other: "Text", n: int) -> None:
        """Become the first n tokens of another text, where its layers still hold what the next
        token sees; else stay as it is."""
        if other.holds(n):
            for own, theirs in zip(self.caches, other.caches, strict=True):
                own.copy(theirs, n)
            self.ids[:], self.incomplete = other.ids[:n], False


def in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of their first tokens two texts share."""
    pairs = zip(a, b)  # noqa: B905 - the shorter one ends it
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


class Part(NamedTuple):
    """A text's share of a pass: the next tokens of it, ``ids`` (n,)."""

    text: Text
    ids: Int64Array


class Rows(NamedTuple):
    """Rows begin:end of a pass, which are a text's tokens at ``start`` and after, and the layer's
    memory of that text."""

    cache: TextMemory
    begin: int
    end: int
    start: int


def rows_of(parts: Sequence[Part], layer: int) -> list[Rows]:
    """The Rows of a pass in a layer; the texts do not count its tokens yet."""
    rows, begin = [], 0
    for text, ids in parts:
        end = begin + len(ids)
        rows.append(Rows(text.caches[layer], begin, end, text.position))
        begin = end
    return rows
