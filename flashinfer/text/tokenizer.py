"""Text to token ids and back, by the model's own ``tokenizer.json`` (needs ``tokenizers``).

The library makes token ids of text, in a process of its own, within limits (see worker.py). The way
back is a table, in this process, of the bytes that each token adds, so that a token costs
microseconds and the library's process may end before a model is opened.
"""

import codecs
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.bundle.layout import TOKENIZER
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.plan import memory
from flashinfer.text import worker
from flashinfer.text.worker import Worker, WorkerFailed

MAPPED = 32 << 20  # address space of an interpreter and its libraries that is never touched
STARTED = 64 << 20  # address space that they do touch
PER_BYTE = 64  # bytes of memory that a tokenizer.json takes, at most, for each of its bytes
PER_CHARACTER = 1024  # bytes of memory that tokenizing a text takes, for each character
HEADROOM, PER_TOKEN = 8 << 20, 2048  # bytes set aside for later texts where the process stays
FIRST_CHARACTERS = 1 << 16  # of a text that may be too long, read and tokenized first


class TokenizerFile(Protocol):
    """An open Bundle, or another file that a tokenizer lies in."""

    path: Path

    def where(self, name: str) -> tuple[int, int] | None:
        """(offset, bytes) of the text ``name`` in the file, or None where it has none."""


class Tokenizer:
    """The tokenizer of an open Bundle, which may be closed afterwards.

    budget  memory that this process and the tokenizer's may take together: bytes, "600M"; None:
            what the machine has free
    Raises UserError where the bundle has no tokenizer or the library is not installed, FormatError
    where the tokenizer cannot be read, or takes too much memory or time.
    """

    worker: Worker

    def __init__(self, bundle: TokenizerFile, budget: int | str | None = None) -> None:
        place = bundle.where(TOKENIZER)
        if place is None:
            raise UserError(f"{bundle.path}: has no tokenizer; token ids (--tokens) do without")
        if find_spec("tokenizers") is None:
            raise UserError(
                "text needs the tokenizers library: pip install 'llm-in-a-flash[text]'; token ids "
                "(--tokens) do without"
            )
        self.path, (self.offset, self.length) = bundle.path, place
        self.budget = memory.default_budget() if budget is None else memory.parse_size(budget)
        self.template: str | None = None
        self.seconds: float = worker.SECONDS
        self.set_aside = self.limit = 0  # see stay
        self._take_pieces(*self._load())

    def _load(self) -> tuple[JsonObject, bytes]:
        """Start the library's process; return its answer about the tokenizer."""
        self.worker = Worker(self.set_aside)
        try:
            found = self._timed(
                "load", b"", 0, path=str(self.path), offset=self.offset, length=self.length
            )
        except WorkerFailed as failed:
            self.close()
            raise FormatError(f"{self.path}: its tokenizer cannot be read: {failed}") from None
        if self.template is not None:
            self.use_template(self.template)
        return found

    def _allowance(self, characters: int) -> tuple[int, bool]:
        """(bytes of address space that the process may take for a text, whether it may need more).

        characters  of the text
        """
        wanted, left = STARTED + PER_BYTE * self.length, self.budget - memory.held()[1]
        wanted += PER_CHARACTER * characters
        return self.limit or MAPPED + min(wanted, left), left < wanted

    def _take_pieces(self, answer: JsonObject, data: bytes) -> None:
        n = len(answer["lengths"]) // answer["forms"]
        bounds = np.cumsum([0, *answer["lengths"]], dtype=np.int64)
        self.pieces, self.bounds = data, bounds
        self.first = n if answer["forms"] > 1 else 0  # index of the pieces of a text's first token
        self.silent = np.zeros(n, dtype=bool)
        self.silent[answer["silent"]] = True
        self.strip = answer["strip"]
        self.longest: int = max(answer["lengths"], default=1)  # bytes of the longest piece

    def ask(self, do: str, data: bytes = b"", characters: int = 0, **request: Any) -> JsonObject:
        """The process's answer to a request about a text of so many characters.

        A process that has ended is started again. Raises WorkerFailed.
        """
        if not self.worker.alive:
            self._load()
        return self._timed(do, data, characters, **request)[0]

    def _timed(
        self, do: str, data: bytes, characters: int, **request: Any
    ) -> tuple[JsonObject, bytes]:
        """The answer and its bytes, within the seconds that are left."""
        start, (allowance, short) = time.monotonic(), self._allowance(characters)
        try:
            return self.worker.ask(do, data, allowance, self.seconds, **request)
        except WorkerFailed as failed:
            if short and failed.of_memory:
                raise WorkerFailed(f"{failed}; more --memory may do", True) from None
            raise
        finally:
            self.seconds -= time.monotonic() - start

    def begin(self) -> None:
        """Let the following requests have all of the seconds again."""
        self.seconds = worker.SECONDS

    def use_template(self, source: str) -> None:
        """Take a chat template. Raises FormatError where it is damaged."""
        self.template = source
        try:
            self.ask("template", utf8(source, "the chat template"))
        except WorkerFailed as failed:
            self.close()
            raise FormatError(f"{self.path}: its chat template is damaged: {failed}") from None

    def stay(self, tokens: int) -> None:
        """Keep the process, and set memory aside for it in the budget of a model opened later.

        tokens  of the longest text that will be encoded
        """
        pid, headroom = self.worker.process.pid, HEADROOM + PER_TOKEN * tokens
        space, dram = memory.held(pid)
        self.set_aside, self.limit = dram + headroom, space + headroom
        memory.helpers[pid] = self.set_aside

    def close(self) -> None:
        """End the process, which frees its memory. Encoding starts another process."""
        self.worker.end()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The token ids of a text; with ``special`` with the tokens that begin or end every text.

        Raises UserError where the text is not Unicode, or memory or time do not suffice.
        """
        self.begin()
        return self._encode(text, special)

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            return self.ask("encode", utf8(text), len(text), special=special)["ids"]
        except WorkerFailed as failed:
            raise UserError(
                f"{self.path}: the text of {len(text)} characters cannot be tokenized: {failed}"
            ) from None

    def encode_up_to(
        self, tokens: int, read: Callable[[int], str], special: bool = True
    ) -> tuple[list[int], bool]:
        """(the token ids of a text or of its beginning, whether it is the whole text).

        read  read(n) -> up to n more characters of the text, "" at its end
        The text is read and tokenized only until it is known to have more than ``tokens`` tokens.
        Together with loading the tokenizer this takes no more seconds than one request may.
        """
        text, size = "", min(FIRST_CHARACTERS, 8 * tokens + 64)
        while True:
            text += read(size - len(text))
            ids = self._encode(text, special)
            if len(text) < size:
                return ids, True
            if len(ids) > tokens + 64:  # the last ones may differ from those of the whole text
                return ids, False
            size *= 2

    def piece(self, token_id: int, first: bool) -> bytes | None:
        """The bytes that a token adds to a text, or None where the token is special or unknown.

        first  whether it is the first token of the text that adds bytes
        """
        if not 0 <= token_id < len(self.silent) or self.silent[token_id]:
            return None
        at = token_id + self.first * first
        return self.pieces[self.bounds[at] : self.bounds[at + 1]]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special ones; bytes that are not UTF-8 become U+FFFD.

        It is the whole text that a TextStream yields. It differs from the library's own decoding in
        one point: byte tokens that are not UTF-8 do not spoil the characters beside them.
        """
        stream = TextStream(self)
        return "".join([stream.add(token) for token in ids]) + stream.end()


class TextStream:
    """Turns tokens into text as they come, in whole characters.

    context  tokens P, whose text is already on the screen

    For the tokens T it yields the part of decode(P + T) behind the whole characters of decode(P).
    Where P ends within a character, that character comes first, instead of the U+FFFD with which
    decode(P) ends. A space that a decoder strips from the beginning is stripped from the whole
    text, so not after P. A decoder's clean-up acts on each token alone, so text that was yielded
    never changes. Each token costs the same however long the text is, because at most a part of one
    character is kept.
    """

    def __init__(self, tokenizer: Tokenizer, context: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.first, self.strip = True, tokenizer.strip
        for token in context:
            self.add(token)

    def add(self, token: int) -> str:
        """The text that is certain with this token."""
        piece = self.tokenizer.piece(int(token), self.first)
        if piece is None:
            return ""
        self.first = False
        return self._stripped(self.utf8.decode(piece))

    def end(self) -> str:
        """The rest of the text after the last token: U+FFFD for a part of a character, or ""."""
        return self._stripped(self.utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        """``text`` without the spaces that the whole text loses at its beginning."""
        while self.strip and text:
            if text[0] != " ":
                self.strip = 0
            else:
                text, self.strip = text[1:], self.strip - 1
        return text


def utf8(text: str, name: str = "the text") -> bytes:
    """The bytes of a text. Raises UserError, with the text's name, where it has lone surrogates.

    Python makes lone surrogates of arguments and of input that are not UTF-8.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{name}: is not UTF-8 text") from None
