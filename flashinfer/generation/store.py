"""A store of texts on disk, from which drafts come: what followed the text's end where it stood
before (retrieval-based speculation, He et al. 2024).

The file is a valid safetensors file, as the bundle is, with two tensors: the texts' tokens, and
their suffix array. It is memory-mapped; a look-up touches some dozens of its pages.
"""

import mmap
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from flashinfer.formats.bundle.writer import NewTensor, write_tensors
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.formats.safetensors import SafetensorsFile, TensorInfo
from flashinfer.generation.drafts import EXPECTED, Draft
from flashinfer.generation.sampling import Sampler
from flashinfer.generation.suffixes import END, WIDTH, SuffixIndex, joined, suffix_array

KIND = "flashinfer.draft_store"  # names the file's version in its metadata
VERSION = "1"
VOCABULARY = "flashinfer.vocabulary"
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
    tokens = joined(texts)
    count = int(np.count_nonzero(tokens != END))
    if not 1 <= count <= len(tokens) <= MOST_TOKENS:
        raise UserError(f"{path}: {count} tokens make no store")
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
    return count


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
            tokens = self._tensor(file, "tokens", "U8")
            suffixes = self._tensor(file, "suffixes", "U32")
            if not suffixes.nbytes or tokens.nbytes != WIDTH * (suffixes.nbytes // 4):
                raise FormatError(f"{path}: its tokens and suffixes do not belong together")
            self.map = mmap.mmap(file.file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(self.map)
        self.views = (
            view[tokens.offset : tokens.offset + tokens.nbytes],
            view[suffixes.offset : suffixes.offset + suffixes.nbytes].cast("I"),
        )
        self.index = SuffixIndex(*self.views)
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
        length, places = self.index.longest(ids)
        if not length:
            return None
        following = partial(self.index.following, places, length, self.vocab_size)
        return Draft(most, f"{self.name} {length}", EXPECTED[length - 1], following)

    def _give_back(self) -> None:
        """Keep what is mapped within bounds; what is dropped is read again when it is needed."""
        self.looked_up += LOOKUP_BYTES
        if len(self.map) > self.mapped_bytes < self.looked_up + LOOKUP_BYTES:
            self.map.madvise(mmap.MADV_DONTNEED)
            self.looked_up = 0

    def close(self) -> None:
        """Give the memory back."""
        for view in reversed(self.views):
            view.release()
        self.map.close()
