"""Keys and values on flash, where the context outgrows the budget.

The file is laid out as the key/value cache is in DRAM, and a layer's part of it is read to where
attention finds it. So attention is computed as it is over keys and values that stay, with the same
bits. Two layers' parts have room in DRAM: one that is used, and the next one on its way. What is
new goes to a tail in DRAM, and to the file when it fills a page, so that every byte is written
once.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashinfer.formats.arrays import Int64Array, UInt8Array
from flashinfer.formats.errors import UserError
from flashinfer.formats.files import nameless_file
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.formats.layers.mixer import MixerConfig
from flashinfer.formats.number_formats import FORMATS
from flashinfer.paper.flash import Flash, Submitted, aligned_bytes
from flashinfer.paper.open_file import Engine
from flashinfer.transformer.kv_cache import (
    ELEMENTS,
    KeyValueCache,
    KVDtype,
    kept_tokens,
    padded_width,
    token_bytes,
)
from flashinfer.transformer.text import Rows
from flashinfer.transformer.text_memory import MOVING, TextMemory

BLOCK = 4096  # bytes that offsets, lengths and addresses are multiples of
LEAST_PAGE = 64  # tokens


def may_lie_on_flash(config: MixerConfig, context: int) -> bool:
    """Whether a layer's memory can: keys and values of all tokens. A state is used whole, a layer
    with an attention window keeps few, alibi's table is as wide as the key/value cache, and what
    several layers read would be read as often."""
    if not isinstance(config, AttentionConfig) or config.lends or config.memory_of is not None:
        return False
    return kept_tokens(config, context) == context and not config.alibi


def page_tokens(config: AttentionConfig, dtype: KVDtype) -> int:
    """Tokens that are written together: of each head as many as fill whole blocks."""
    row_bytes = FORMATS[dtype].row_bytes(padded_width(config.head_dim))
    return max(LEAST_PAGE, BLOCK // int(np.gcd(BLOCK, row_bytes)))


def part_tokens(config: AttentionConfig, dtype: KVDtype, context: int) -> int:
    """Tokens that a layer's part of the file has room for: whole pages."""
    page = page_tokens(config, dtype)
    return -(-context // page) * page


def part_bytes(config: AttentionConfig, dtype: KVDtype, context: int) -> int:
    """Bytes of a layer's part of the file: its keys, and then its values."""
    return 2 * part_tokens(config, dtype, context) * token_bytes(config, dtype)


def tail_bytes(config: AttentionConfig, dtype: KVDtype) -> int:
    """Bytes of a layer's tail: the keys and values of a page."""
    return 2 * page_tokens(config, dtype) * token_bytes(config, dtype)


class KeyValueFile:
    """The file that layers' keys and values lie in, and two layers' parts of it in DRAM.

    It has no name, so that nothing of it stays when the process ends. Raises UserError where the
    folder cannot be written, or its disk has no room.

    folder  where it is; nbytes: of all parts; stage_bytes: of the largest
    flash   reads it
    """

    def __init__(self, folder: Path, nbytes: int, stage_bytes: int, io: Engine) -> None:
        self.folder, self.stage_bytes = folder, stage_bytes
        self.fd, self.flash = self._open(nbytes, io)
        self.memory = aligned_bytes(2 * stage_bytes)
        self.given = 0  # bytes of the file that belong to layers
        self.side = 0  # the stage that is read to next
        self.wanted: deque[tuple[KeyValuesOnFlash, int]] = deque()
        self.coming: _Coming | None = None

    def _open(self, nbytes: int, io: Engine) -> tuple[int, Flash]:
        """(descriptor to write to, what reads), past the page cache where that works."""
        fd = nameless_file(self.folder, nbytes)
        flash = None
        try:
            flash = Flash(f"/dev/fd/{fd}", io, 0, self.folder / "(keys and values)")
            if flash.alignment > 1:
                direct = os.open(f"/dev/fd/{fd}", os.O_WRONLY | os.O_DIRECT)
                os.close(fd)
                fd = direct
            return fd, flash
        except BaseException:
            if flash is not None:
                flash.close()
            os.close(fd)
            raise

    def allocate(self, nbytes: int) -> int:
        """Where in the file a layer's part of so many bytes begins."""
        self.given += nbytes
        return self.given - nbytes

    def begin(self, texts: Iterable[Rows]) -> None:
        """A pass begins which needs what ``texts`` name, in this order; each is read while the one
        before it is used."""
        self.abandon()
        for text in texts:
            if isinstance(text.cache, KeyValuesOnFlash):
                self.wanted.append((text.cache, text.start))
        self._send_next()

    def bring(self, cache: "KeyValuesOnFlash", position: int) -> UInt8Array:
        """A layer's part in DRAM, with all that the file has of the tokens before ``position``; it
        stays until the next but one is brought. Raises FormatError where it cannot be read."""
        if self.coming is None or (self.coming.cache, self.coming.position) != (cache, position):
            self.abandon()
            self.wanted.append((cache, position))
            self._send_next()
        coming, self.coming = self.coming, None
        assert coming is not None
        if coming.reads is not None:
            self.flash.wait(coming.reads)
        self._send_next()
        return coming.stage

    def _send_next(self) -> None:
        """Begin to read what is wanted next."""
        if not self.wanted:
            return
        cache, position = self.wanted.popleft()
        first = self.side * self.stage_bytes
        offsets, lengths = cache.reads(position)
        reads = None
        if len(offsets):
            destinations = first + offsets - cache.offset
            reads = self.flash.submit(offsets, lengths, self.memory, destinations)
        stage = self.memory[first : first + self.stage_bytes]
        self.coming, self.side = _Coming(cache, position, stage, reads), 1 - self.side

    def write(self, offset: int, memory: UInt8Array) -> None:
        """Write whole blocks. Raises UserError where the disk does not take them."""
        try:
            while len(memory):
                written = os.pwrite(self.fd, memory.data, offset)
                memory, offset = memory[written:], offset + written
        except OSError as error:
            raise UserError(
                f"{self.flash.path}: cannot be written: {error.strerror}; --scratch names another "
                "folder for them"
            ) from None

    def abandon(self) -> None:
        """Return when nothing is in flight, and nothing is wanted."""
        self.wanted.clear()
        self.coming = None
        self.flash.settle()

    def close(self) -> None:
        """Close the file, which is gone then; reads in flight are finished first."""
        if self.fd >= 0:
            self.abandon()
            self.flash.close()
            os.close(self.fd)
            self.fd = -1


class KeyValuesOnFlash(KeyValueCache):
    """One layer's keys and values, of which the file has whole pages and DRAM the tail.

    ``keys`` and ``values`` are there from ``bring`` until the next but one is brought.

    offset   of this layer's part in the file
    tail     (2, key/value heads, page, row): keys and values of the tokens from ``in_file`` on
    in_file  tokens whose keys and values the file has, a multiple of a page
    """

    def __init__(
        self,
        file: KeyValueFile,
        config: AttentionConfig,
        dtype: KVDtype,
        context: int,
        tail: UInt8Array,
    ) -> None:
        self.file, self.in_file = file, 0
        self.offset = file.allocate(part_bytes(config, dtype, context))
        self.page = page_tokens(config, dtype)
        self.element = ELEMENTS[dtype]
        self.tokens, self.heads = part_tokens(config, dtype, context), config.num_key_value_heads
        self.row_bytes = token_bytes(config, dtype) // self.heads
        self.tail = self._rows(tail, self.page)
        keys, values = self._rows(file.memory, self.tokens)
        super().__init__(keys, values, config.attention_window, context)

    def _rows(self, memory: UInt8Array, tokens: int) -> np.ndarray:
        """Memory that begins with keys and values -> (2, key/value heads, tokens, row)."""
        nbytes = 2 * self.heads * tokens * self.row_bytes
        return memory[:nbytes].view(self.element).reshape(2, self.heads, tokens, -1)

    def reads(self, position: int) -> tuple[Int64Array, Int64Array]:
        """(offsets, lengths) of what the file has of the tokens before ``position``."""
        end = min(-(-position // self.page) * self.page, self.in_file)
        heads = np.arange(2 * self.heads if end else 0, dtype=np.int64)
        lengths = np.full(len(heads), end * self.row_bytes, dtype=np.int64)
        return self.offset + heads * self.tokens * self.row_bytes, lengths

    def bring(self, position: int) -> None:
        """Have ``keys`` and ``values`` of the tokens before ``position`` in DRAM."""
        rows = self._rows(self.file.bring(self, position), self.tokens)
        end = max(position, self.in_file)
        rows[:, :, self.in_file : end] = self.tail[:, :, : end - self.in_file]
        self.keys, self.values = rows

    def pieces(self, start: int, n: int) -> Iterator[tuple[int, int]]:
        """As of any KeyValueCache; what is new is kept behind it."""
        if start == 0:
            self.first = 0
        self.bring(start)
        yield 0, n
        self.keep(start, start + n)

    def keep(self, start: int, end: int) -> None:
        """Keep ``keys`` and ``values`` of the tokens start..end; those before are kept already.

        Interrupted anywhere, it has lost nothing of the tokens before ``start``.
        """
        base = end // self.page * self.page
        first = min(start // self.page * self.page, self.in_file)
        if base > first:
            self._write(first, base)
        begin = base  # in the tail, tokens before ``start`` stay where no page was filled
        if base >= self.in_file:
            self.in_file, begin = base, max(start, base)
        for tail, memory in zip(self.tail, (self.keys, self.values), strict=True):
            tail[:, begin - base : end - base] = memory[:, begin:end]
        self.in_file = base

    def _write(self, begin: int, end: int) -> None:
        """Write the pages of the tokens begin..end to the file."""
        heads = (*self.keys, *self.values)
        for number, head in enumerate(heads):
            rows = head[begin:end].view(np.uint8).reshape(-1)
            self.file.write(self.offset + (number * self.tokens + begin) * self.row_bytes, rows)

    def copy(self, other: TextMemory, position: int) -> None:
        """Become what another text's memory of the same layer is before ``position``."""
        assert isinstance(other, KeyValueCache)
        self.first = MOVING  # an interrupt leaves some tokens copied and others not
        other.bring(position)
        self.keys, self.values, self.in_file = other.keys, other.values, 0
        self.keep(0, position)
        self.first = other.first


class _Coming(NamedTuple):
    """What is on its way: a layer's part as of ``position``, to ``stage``; reads: None where the
    file has nothing of it."""

    cache: KeyValuesOnFlash
    position: int
    stage: UInt8Array
    reads: Submitted | None
