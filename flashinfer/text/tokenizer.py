"""Text to token ids and back, by the model's own ``tokenizer.json`` (needs ``tokenizers``).

The library runs in a process of its own, within limits (see worker.py): it makes token ids of text.
The way back is taken here, by a table of what each token says, so that a token costs microseconds
and the process may end before a model is opened.
"""

import codecs
import time
from importlib.util import find_spec

import numpy as np

from flashinfer.formats.bundle.layout import TOKENIZER
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.plan import memory
from flashinfer.text import worker
from flashinfer.text.worker import Worker, WorkerFailed

MAPPED = 32 << 20  # address space of an interpreter and its libraries that is never touched
STARTED = 64 << 20  # what they take besides
PER_BYTE = 64  # memory that a tokenizer.json takes, at most, for each of its bytes
PER_CHARACTER = 1024  # and a text that becomes tokens, for each character
HEADROOM, PER_TOKEN = 8 << 20, 2048  # set aside for texts to come where the process stays
FIRST_CHARACTERS = 1 << 16  # of a text that may be too long: what is tried first


class Tokenizer:
    """The tokenizer of an open Bundle, which may be closed afterwards.

    budget  what this process and the tokenizer's may hold together: bytes, "600M"; None: what the
            machine has free
    Raises UserError where there is none, or no library, FormatError where it cannot be read, or
    takes too much memory or time.
    """

    def __init__(self, bundle, budget=None):
        place = bundle.where(TOKENIZER)
        if place is None:
            raise UserError(f"{bundle.path}: has no tokenizer; flashinfer run --tokens takes ids")
        if find_spec("tokenizers") is None:
            raise UserError(
                "text needs the tokenizers library: pip install 'llm-in-a-flash[text]'; token ids "
                "(--tokens) do without"
            )
        self.path, (self.offset, self.length) = bundle.path, place
        self.budget = memory.default_budget() if budget is None else memory.parse_size(budget)
        self.template = self.worker = None
        self.seconds = worker.SECONDS
        self.set_aside = self.limit = 0  # see stay
        self._take_pieces(*self._load())

    def _load(self):
        """Start the process that has the library; what it says of the tokenizer."""
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

    def _allowance(self, characters):
        """(bytes of address space that the process may take for a text, whether the budget has
        fewer than it may need)."""
        wanted, left = STARTED + PER_BYTE * self.length, self.budget - memory.held()[1]
        wanted += PER_CHARACTER * characters
        return self.limit or MAPPED + min(wanted, left), left < wanted

    def _take_pieces(self, answer, data):
        n = len(answer["lengths"]) // answer["forms"]
        bounds = np.cumsum([0, *answer["lengths"]], dtype=np.int64)
        self.pieces, self.bounds = data, bounds
        self.first = n if answer["forms"] > 1 else 0  # where the pieces of a first token are
        self.silent = np.zeros(n, dtype=bool)
        self.silent[answer["silent"]] = True
        self.strip = answer["strip"]
        self.longest = max(answer["lengths"], default=1)  # bytes of a piece

    def ask(self, do, data=b"", characters=0, **request):
        """The process's answer; where it has ended it is started again. Raises WorkerFailed."""
        if not self.worker.alive:
            self._load()
        return self._timed(do, data, characters, **request)[0]

    def _timed(self, do, data, characters, **request):
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

    def begin(self):
        """Give what is asked from now on seconds of its own."""
        self.seconds = worker.SECONDS

    def use_template(self, source):
        """Take a chat template. Raises FormatError where it is damaged."""
        self.template = source
        try:
            self.ask("template", utf8(source, "the chat template"))
        except WorkerFailed as failed:
            self.close()
            raise FormatError(f"{self.path}: its chat template is damaged: {failed}") from None

    def stay(self, tokens):
        """Keep the process, and set memory aside for it, which a model opened now reckons with.

        tokens  of the longest text to come
        """
        pid, headroom = self.worker.process.pid, HEADROOM + PER_TOKEN * tokens
        space, dram = memory.held(pid)
        self.set_aside, self.limit = dram + headroom, space + headroom
        memory.helpers[pid] = self.set_aside

    def close(self):
        """End the process, which gives its memory back. Encoding starts another one."""
        self.worker.end()

    def encode(self, text, special=True):
        """Token ids; with ``special`` with the tokens that every text begins or ends with.

        Raises UserError where the text is no Unicode, or the memory or seconds are not enough.
        """
        self.begin()
        return self._encode(text, special)

    def _encode(self, text, special):
        try:
            return self.ask("encode", utf8(text), len(text), special=special)["ids"]
        except WorkerFailed as failed:
            raise UserError(
                f"{self.path}: the text of {len(text)} characters cannot be tokenized: {failed}"
            ) from None

    def encode_up_to(self, tokens, read, special=True):
        """(token ids of a text, or of its beginning; whether it is all of it).

        read  read(n) -> up to n more characters of it, "" at its end
        As little is read and tokenized as shows that it has more than ``tokens`` tokens. Takes no
        more seconds, with loading the tokenizer before, than one request may.
        """
        text, size = "", min(FIRST_CHARACTERS, 8 * tokens + 64)
        while True:
            text += read(size - len(text))
            ids = self._encode(text, special)
            if len(text) < size:
                return ids, True
            if len(ids) > tokens + 64:  # those beside the cut may be others than in the whole
                return ids, False
            size *= 2

    def piece(self, token_id, first):
        """The bytes that a token adds to a text, or None where it is special or unknown.

        first  whether it is the first one that says something
        """
        if not 0 <= token_id < len(self.silent) or self.silent[token_id]:
            return None
        at = token_id + self.first * first
        return self.pieces[self.bounds[at] : self.bounds[at + 1]]

    def decode(self, ids):
        """The text of token ids, without special ones; what is not UTF-8 becomes U+FFFD.

        This is what a TextStream says in all. Of the library's own decoding it differs in one
        point: byte tokens that are no UTF-8 spoil no character beside them.
        """
        stream = TextStream(self)
        return "".join([stream.add(token) for token in ids]) + stream.end()


class TextStream:
    """Turns tokens into text as they come, never half a character.

    After the tokens P of a prompt, what it yields for the tokens T is the rest of decode(P + T)
    behind the whole characters of decode(P). Where P ends within a character, that character is
    the first one to come, instead of the U+FFFD with which decode(P) ends. A space that a decoder
    strips in front is stripped of the whole text, so not after P; what a decoder cleans up, it
    cleans token by token, so nothing that was said changes. Each token costs the same, however
    long the text: what is kept is half a character at most.

    context  P: tokens that are already on the screen
    """

    def __init__(self, tokenizer, context=()):
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.first, self.strip = True, tokenizer.strip
        for token in context:
            self.add(token)

    def add(self, token):
        """The text that became certain with this token."""
        piece = self.tokenizer.piece(int(token), self.first)
        if piece is None:
            return ""
        self.first = False
        return self._stripped(self.utf8.decode(piece))

    def end(self):
        """What is left when no more tokens come: U+FFFD, of half a character."""
        return self._stripped(self.utf8.decode(b"", final=True))

    def _stripped(self, text):
        """Without the spaces that a text loses in front."""
        while self.strip and text:
            if text[0] != " ":
                self.strip = 0
            else:
                text, self.strip = text[1:], self.strip - 1
        return text


def utf8(text, name="the text"):
    """The bytes of a text. Raises UserError, with its name, where it has lone surrogates, as Python
    makes them of arguments and of input that are not UTF-8."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{name}: is not UTF-8 text") from None
