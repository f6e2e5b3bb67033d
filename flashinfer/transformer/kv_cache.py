"""Keys and values of the tokens that a layer's attention still sees."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import UInt8Array
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.formats.number_formats import FORMATS, NumberFormat
from flashinfer.transformer.text import MOST_IN_PASS
from flashinfer.transformer.text_memory import MOVING, TextMemory

KVDtype = Literal["f32", "f16", "q8_0"]
KV_DTYPES: tuple[KVDtype, ...] = ("f32", "f16", "q8_0")
# What an array of each has for its elements; rows of q8_0 are bytes.
ELEMENTS: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "q8_0": np.dtype(np.uint8),
}
BY_ELEMENT = {element: FORMATS[name] for name, element in ELEMENTS.items()}
LANES = 32  # a head's width in the key/value cache is padded to whole vectors
# Of a layer with an attention window, beyond the window: tokens that may be taken back without
# computing them again, and tokens that find room before the older ones are moved to the front.
TAKEN_BACK, FRESH = 64, 128


PAGE = 4096


def pages(nbytes: int) -> int:
    """Bytes up to a multiple of a page."""
    return -(-nbytes // PAGE) * PAGE


def padded_width(head_dim: int) -> int:
    return -(-head_dim // LANES) * LANES


def kept_tokens(config: AttentionConfig, context: int) -> int:
    """Tokens whose keys and values a layer keeps: all of the context, or about its window, and
    where later layers read them all of a pass besides."""
    window = config.attention_window
    if window is None or config.alibi:  # whose table is by positions of the context
        return context
    return min(context, window + TAKEN_BACK + (MOST_IN_PASS if config.lends else FRESH))


def token_bytes(config: AttentionConfig, dtype: KVDtype) -> int:
    """Bytes of a token's keys, or of its values, in one layer, in this number format."""
    return config.num_key_value_heads * FORMATS[dtype].row_bytes(padded_width(config.head_dim))


class KeyValueCache(TextMemory):
    """One layer's keys and values, of all tokens or of the last ones.

    A window slides through a longer memory: when the memory is full, what the window still holds
    moves to its front.

    keys, values  (key/value heads, tokens, padded head_dim), float32 or float16; or uint8, rows of
            q8_0's blocks
    window  tokens that each sees, itself included; None: all
    lends   later layers read it, so that all tokens of a pass are in memory at its end
    first   position in the text of the first token in memory
    """

    names: ClassVar[tuple[str, ...]] = ("keys", "values")

    def __init__(
        self,
        keys: np.ndarray,
        values: np.ndarray,
        window: int | None,
        context: int,
        lends: bool = False,
    ) -> None:
        self.keys, self.values, self.window, self.first = keys, values, window, 0
        self.lends = lends
        self.slides = keys.shape[1] < context
        self.format = self.number_format.safetensors

    @property
    def number_format(self) -> NumberFormat:
        """That of keys and values."""
        return BY_ELEMENT[self.keys.dtype]

    @property
    def width(self) -> int:
        """Values of a row: a padded head_dim."""
        return self.keys[0, 0].nbytes // self.number_format.block_bytes * self.number_format.block

    def holds(self, position: int) -> bool:
        """Whether a token at ``position`` finds all that it sees."""
        oldest = 0 if self.window is None else max(0, position - self.window + 1)
        return position == 0 or self.first <= oldest

    def pieces(self, start: int, n: int) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of the n tokens at ``start``, as many at a time as find room; of each
        piece the caller remembers and uses the keys and values before it asks for the next."""
        if start == 0:
            self.first = 0
        begin = 0
        while begin < n:
            after = start + (n if self.lends else begin + 1)
            if after - self.first > self.keys.shape[1]:
                self._move(start + begin)
            end = min(n, self.first + self.keys.shape[1] - start)
            yield begin, end
            begin = end

    def remember(self, k: np.ndarray, v: np.ndarray, start: int) -> int:
        """Keep k, v (T, key/value heads, head_dim) float32 of the tokens at ``start``; returns
        where in ``keys`` and ``values`` the first of them is."""
        place = start - self.first
        kernels.remember(self.keys, k, place)
        kernels.remember(self.values, v, place)
        return place

    def copy(self, other: TextMemory, position: int) -> None:
        """Become what another text's memory of the same layer is before ``position``."""
        assert isinstance(other, KeyValueCache)
        n = position - other.first
        self.first = MOVING  # an interrupt leaves some tokens copied and others not
        self.keys[:, :n], self.values[:, :n] = other.keys[:, :n], other.values[:, :n]
        self.first = other.first

    def can_hold(self, first: int, end: int) -> bool:
        """Whether it has room for the tokens first..end of a text, those before forgotten."""
        return end - first <= self.keys.shape[1] and not (first and self.window is None)

    def shape(self, name: str, tokens: int) -> tuple[int, ...]:
        """(key/value heads, tokens, row) of keys, and of values."""
        return len(self.keys), tokens, self.keys.shape[2]

    def rows(self, name: str, tokens: int) -> Iterator[UInt8Array]:
        """Of each head the bytes of its first tokens, in place."""
        memory = getattr(self, name)
        return (head[:tokens].view(np.uint8).reshape(-1) for head in memory)

    def _move(self, position: int) -> None:
        """Make room for a token at ``position``."""
        first = position - self.window - TAKEN_BACK
        gone, kept = first - self.first, position - first
        self.first = MOVING  # an interrupt leaves some tokens moved and others not
        for memory in (self.keys, self.values):
            for head in memory:  # in pieces that do not overlap, so that nothing is copied twice
                for begin in range(0, kept, gone):
                    end = min(begin + gone, kept)
                    head[begin:end] = head[begin + gone : end + gone]
        self.first = first


class LatentCache(KeyValueCache):
    """One layer's rows of latent attention, which all heads share: each is a key and a value.

    keys, values  one array (1, tokens, padded width)
    """

    names = ("keys",)

    def __init__(self, rows: np.ndarray, context: int) -> None:
        super().__init__(rows, rows, None, context)

    def remember_rows(self, x: np.ndarray, start: int) -> int:
        """Keep x (T, 1, width) float32 of the tokens at ``start``; returns where in ``keys`` the
        first of them is."""
        if start == 0:
            self.first = 0
        kernels.remember(self.keys, x, start)
        return start

    def copy(self, other: TextMemory, position: int) -> None:
        """Become what another text's memory of the same layer is before ``position``."""
        assert isinstance(other, LatentCache)
        self.first = MOVING  # an interrupt leaves some tokens copied and others not
        self.keys[:, :position] = other.keys[:, :position]
        self.first = 0
