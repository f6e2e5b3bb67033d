"""What a feed-forward layer asks of its parts, whichever they are."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float32Array, Int32Array
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.paper.selection import Selection

# x (T, d_model) -> (T, d_model): a norm.
Map = Callable[[Float32Array], Float32Array]


class Stream(Protocol):
    """What is streamed at every token: a ``tensor``, and the one that is streamed after it."""

    tensor: StoredTensor
    following: StoredTensor | None


class Chooser(Protocol):
    """Says which units tokens use: a Predictor, a Router, or a RoutedPredictor."""

    @property
    def in_dram(self) -> bool:
        """Whether asking it reads nothing from flash."""

    def select(self, x: Float32Array, residual: Float32Array | None) -> Selection:
        """The FFN's input after and before its norm, each (T, d_model) -> the Selection."""

    def early(
        self, x: Float32Array, residual: Float32Array | None, share: float = 1.0
    ) -> tuple[Int32Array, Int32Array]:
        """(units worth reading, units worth keeping) by an input (1, d_model) that is not final."""

    def streams(self) -> tuple[Stream, ...]:
        """What of it is streamed at every token, in this order."""

    def set_tap(self, tap: "Tap | None") -> None:
        """Tell ``tap`` what it finds from now on; None: nobody."""


class LowRankMap(Protocol):
    """One of a predictor's two matrices, in DRAM or streamed: see transformer/weights.py."""

    @property
    def in_dram(self) -> bool:
        """Whether it is there without a read."""

    def linear(self, x: Float32Array, bias: Float32Array | None = None) -> Float32Array:
        """x (T, columns) -> (T, rows)."""

    def some(self, x: Float32Array, ids: AnyArray, bias: Float32Array) -> Float32Array:
        """As ``linear``, of the rows ``ids`` alone."""

    def streams(self) -> tuple[Stream, ...]:
        """What of it is streamed at every token."""


class Shared(Protocol):
    """What every token uses besides: see transformer/shared_expert.py."""

    tap: "Tap | None"

    def __call__(self, x: Float32Array) -> Float32Array:
        """x (T, d_model) -> (T, d_model)."""

    def streams(self) -> tuple[Stream, ...]:
        """What of it is streamed at every token, in this order."""


class Columns(NamedTuple):
    """Some columns of a value: ``values`` (T, n) float32 are its columns ``ids`` (n,)."""

    values: Float32Array
    ids: AnyArray

    @classmethod
    def of(
        cls,
        a: Float32Array,
        ids: AnyArray,
        indptr: Int32Array | None,
        tokens: Int32Array | None,
        n_tokens: int,
    ) -> "Columns":
        """From ``a`` as ``Neurons.activations`` gives it; 0 for the tokens that do not use one."""
        if indptr is None:
            return cls(a.T, ids)
        values = np.zeros((n_tokens, len(ids)), dtype=np.float32)
        values[tokens, np.repeat(np.arange(len(ids)), np.diff(indptr))] = a
        return cls(values, ids)


class Tap(Protocol):
    """Is told a run's intermediate values as they are computed, while a model is traced.

    What computes them has an attribute ``tap``, which is None otherwise.
    """

    def __call__(self, **values: AnyArray | Columns) -> None:
        """Values by the names of transformer/values.py, (T, ...) each; the arrays are the engine's
        own, which will go on writing into them."""
