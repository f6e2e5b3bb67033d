"""A store of texts on disk, from which drafts come: what followed the text's end where it stood
before (retrieval-based speculation, He et al. 2024).

The file is a valid safetensors file, as the bundle is, with two tensors: the texts' tokens, and
their suffix array. It is memory-mapped; a look-up touches some dozens of its pages.
"""

import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from flashinfer.formats.arrays import AnyArray, Int64Array
from flashinfer.formats.bundle.writer import NewTensor, write_tensors
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.formats.safetensors import SafetensorsFile, TensorInfo
from flashinfer.generation.drafts import EXPECTED, LONGEST, Draft
from flashinfer.generation.sampling import Sampler

KIND = "flashinfer.draft_store"  # names the file's version in its metadata
VERSION = "1"
VOCABULARY = "flashinfer.vocabulary"
WIDTH = 4  # bytes of a token: big-endian, so that bytes compare as tokens do
END = (1 << 32) - 1  # between two texts
DEPTH = 64  # tokens by which suffixes are sorted, at least
MOST_TOKENS = (1 << 31) - 1
LOOKUP_BYTES = 2 << 20  # of the file, that a look-up touches at most
MAPPED_BYTES = 16 << 20  # of a larger file, that stay in memory


def write_store(
    path: Path | str,
    texts: Iterable[Sequence[int]],
    vocabulary: str,
    progress: Progress = no_progress,
) -> int:
    """Write the store of some texts, given as token ids; returns how many tokens they have.

    vocabulary  what the ids mean: see Bundle.vocabulary
    Memory: some 40 bytes a token. Raises UserError where there is no token, or the file cannot be
    written.
    """
    pieces = [np.array([*ids, END], dtype=np.uint32) for ids in texts]
    tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint32)
    if len(tokens) <= len(pieces) or len(tokens) > MOST_TOKENS:
        raise UserError(f"{path}: {len(tokens) - len(pieces)} tokens make no store")
    data = tokens.astype(">u4").tobytes()
    order = suffix_array(tokens).astype("<u4").tobytes()
    write_tensors(
        path,
        [
            NewTensor("tokens", "U8", (len(tokens), WIDTH), len(data), lambda: [data]),
            NewTensor("suffixes", "U32", (len(tokens),), len(order), lambda: [order]),
        ],
        {"format": "flashinfer", KIND: VERSION, VOCABULARY: vocabulary},
        progress,
    )
    return len(tokens) - len(pieces)


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


def is_store(path: Path | str) -> bool:
    """Whether the file calls itself a draft store. Raises FormatError where it is no safetensors
    file."""
    with SafetensorsFile(path) as file:
        return KIND in file.metadata


class Store:
    """An open store, which drafts what followed the text's end there.

    mapped_bytes  of memory that it takes at most
    vocabulary    what its token ids mean
    Raises FormatError where the file is no store, cut or damaged.
    """

    name = "store"

    def __init__(self, path: Path | str, vocab_size: int) -> None:
        self.path, self.vocab_size = Path(path), vocab_size
        with SafetensorsFile(path) as file:
            if file.metadata.get(KIND) != VERSION:
                raise FormatError(
                    f"{path}: is not a store of drafts; flashinfer surrogate makes one"
                )
            file.check_header()
            self.vocabulary = file.metadata.get(VOCABULARY, "")
            tokens, suffixes = (
                self._tensor(file, "tokens", "U8"),
                self._tensor(file, "suffixes", "U32"),
            )
            self.n = suffixes.nbytes // 4
            if not self.n or tokens.nbytes != self.n * WIDTH:
                raise FormatError(f"{path}: its tokens and suffixes do not belong together")
            self.map = mmap.mmap(file.file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(self.map)
        self.tokens = view[tokens.offset : tokens.offset + tokens.nbytes]
        self.suffixes = view[suffixes.offset : suffixes.offset + suffixes.nbytes].cast("I")
        self.mapped_bytes = min(len(self.map), MAPPED_BYTES)
        self.looked_up = 0  # since pages were given back

    def _tensor(self, file: SafetensorsFile, name: str, dtype: str) -> TensorInfo:
        """A tensor of the file, whose bytes are those that were written. Raises FormatError."""
        info = file.tensors.get(name)
        if info is None or info.dtype != dtype:
            raise FormatError(f"{file.path}: has no tensor {name} of a store")
        file.check_tensor(name)
        return info

    def seconds(self, tokens: int) -> float:
        """Nothing worth counting."""
        return 0.0

    def draft(self, ids: Sequence[int], most: int, sampler: Sampler) -> Draft | None:
        """The Draft of up to ``most`` tokens; see Drafter."""
        self._give_back()
        end = np.array(ids[-LONGEST:], dtype=">u4").tobytes()
        length, found = 0, range(0)
        low, high = 1, len(end) // WIDTH
        while low <= high:  # what ends in k tokens that stand there ends in fewer, too
            middle = (low + high) // 2
            places = self._places(end[-WIDTH * middle :], range(self.n), 0)
            if places:
                length, found, low = middle, places, middle + 1
            else:
                high = middle - 1
        if not length:
            return None
        kind = f"{self.name} {length}"
        return Draft(most, kind, EXPECTED[length - 1], partial(self._following, found, length))

    def _following(self, places: range, length: int, n: int) -> list[int]:
        """The n tokens that most often follow the ``length`` tokens with which the suffixes
        numbered ``places`` begin; fewer where the texts end there."""
        tokens: list[int] = []
        while len(tokens) < n:
            # The suffixes are sorted: where most go on alike, so does the one in the middle.
            at = WIDTH * (self.suffixes[places[len(places) // 2]] + length)
            token = bytes(self.tokens[at : at + WIDTH])
            if int.from_bytes(token, "big") >= self.vocab_size:
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

    def _give_back(self) -> None:
        """Keep what is mapped within bounds; what is dropped is read again when it is needed."""
        self.looked_up += LOOKUP_BYTES
        if len(self.map) > self.mapped_bytes < self.looked_up + LOOKUP_BYTES:
            self.map.madvise(mmap.MADV_DONTNEED)
            self.looked_up = 0

    def close(self) -> None:
        """Give the memory back."""
        self.tokens.release()
        self.suffixes.release()
        self.map.close()
