"""What a layer keeps of a text for its next tokens: keys and values, or a state."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from flashinfer.formats.arrays import UInt8Array

MOVING = 1 << 60  # the first position while memory is being changed: no token finds what it needs


class TextMemory(ABC):
    """One layer's memory of one text.

    names   of its arrays, as a session's file has them
    format  safetensors' name of their numbers
    first   position in the text of the first token that is not forgotten; of a state, of the first
            one that is not in it
    """

    names: ClassVar[tuple[str, ...]]
    format: str
    first: int

    @abstractmethod
    def holds(self, position: int) -> bool:
        """Whether a token at ``position`` finds all that it needs; a text may always begin."""

    def settled(self, position: int) -> int:
        """The last token, up to ``position``, whose memory a session's file can hold."""
        return position

    def bring(self, position: int) -> None:  # noqa: B027 - most have nothing to do
        """Have the memory of the tokens before ``position`` in DRAM: here always."""

    def keep(self, start: int, end: int) -> None:  # noqa: B027
        """Keep the memory of the tokens start..end, which may have changed: here nothing is to be
        done."""

    @abstractmethod
    def copy(self, other: "TextMemory", position: int) -> None:
        """Become what another text's memory of the same layer is before ``position``."""

    @abstractmethod
    def can_hold(self, first: int, end: int) -> bool:
        """Whether it has room for the tokens first..end of a text, those before forgotten."""

    @abstractmethod
    def shape(self, name: str, tokens: int) -> tuple[int, ...]:
        """Of one of its arrays with so many tokens."""

    @abstractmethod
    def rows(self, name: str, tokens: int) -> Iterator[UInt8Array]:
        """The bytes of an array's first ``tokens`` tokens, in pieces, in place."""


class BorrowedMemory(TextMemory):
    """That of a layer that reads an earlier layer's memory of the text, and keeps nothing itself.

    of  the earlier layer's
    """

    names = ()

    def __init__(self, of: TextMemory) -> None:
        self.of, self.format, self.first = of, of.format, 0

    def holds(self, position: int) -> bool:
        """Always: the other layer's answers for both."""
        return True

    def copy(self, other: TextMemory, position: int) -> None:
        """Nothing is to be done: the other layer's is copied."""

    def can_hold(self, first: int, end: int) -> bool:
        """Whether a session's file says of it what ``first`` is here."""
        return first == 0

    def shape(self, name: str, tokens: int) -> tuple[int, ...]:
        """Is not called: there are no arrays."""
        raise KeyError(name)

    def rows(self, name: str, tokens: int) -> Iterator[UInt8Array]:
        """The same."""
        raise KeyError(name)
