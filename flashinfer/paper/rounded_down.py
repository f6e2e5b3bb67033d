"""The down projection of activations that are rounded to 8 bits (BitNet b1.58)."""

from typing import NamedTuple

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import AnyArray, Float32Array, Int32Array, Int64Array, UInt8Array
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.layers.ffn import FFNConfig
from flashinfer.formats.number_formats import Matrices, NumberFormat
from flashinfer.paper.activations_norm import ActivationsNorm
from flashinfer.paper.selection import Selection


def room_bytes(bundle: Bundle) -> int:
    """Bytes of the room that the ``RoundedDown`` of each layer uses in turn: for the rows of the
    down projection of all of a layer's neurons."""
    most = 0
    for number in bundle.config.with_neurons:
        config, format = bundle.config.layers[number].ffn, bundle.bundles(number).format
        if config.rounded and not isinstance(format, Matrices):
            most = max(most, config.neurons * format.row_bytes(config.hidden_size))
    return most


class TokenScales:
    """The scale that each token's activations are rounded with, where these come in parts.

    It is that of the largest of them, so that none can be rounded before all are known. Neurons
    that are not read count as silent.

    norm     ActivationsNorm, which weights activations and divides them before; or None
    largest  (T,) float32: magnitudes of the largest so far
    """

    def __init__(self, norm: ActivationsNorm | None) -> None:
        self.norm = norm
        self.largest: Float32Array = np.zeros(0, dtype=np.float32)

    def begin(self, n_tokens: int) -> None:
        """The tokens that follow are other ones, so many."""
        self.largest = np.zeros(n_tokens, dtype=np.float32)
        if self.norm is not None:
            self.norm.begin(n_tokens)

    def take(
        self,
        a: Float32Array,
        neurons: AnyArray,
        indptr: Int32Array | None = None,
        tokens: Int32Array | None = None,
    ) -> Float32Array:
        """Count the activations of ``neurons``, which follow those counted so far, and weight them
        in place; a: as ``Neurons.activations`` gives it. Returns a."""
        if self.norm is not None:
            a = self.norm.take(a, neurons, indptr, tokens)
        if indptr is None:
            np.maximum(self.largest, np.abs(a).max(axis=0, initial=0), out=self.largest)
        else:
            np.maximum.at(self.largest, tokens, np.abs(a))
        return a

    def weigh(self, a: Float32Array, neurons: AnyArray) -> Float32Array:
        """Weight activations (n, T) as ``take`` does, in place, and count none. Returns a."""
        return a if self.norm is None else self.norm.weigh(a, neurons)

    def round(self, a: Float32Array, tokens: Int32Array | None = None) -> Float32Array:
        """What the down projection reads of weighted activations (n, T), or (pairs,) of ``tokens``,
        when all are counted: the same shape, as ``kernels.linear`` rounds tokens. a is overwritten.
        """
        factors, largest = np.float32(1), self.largest  # (T,)
        if self.norm is not None:
            factors = self.norm.factors()
            largest = largest * factors  # that of the products, as rounding keeps their order
        if tokens is not None:
            factors, largest = np.broadcast_to(factors, largest.shape)[tokens], largest[tokens]
        a *= factors
        scales, a = kernels.whole_numbers(a, largest)
        a *= scales
        return a


class _Part(NamedTuple):
    """Some neurons' activations, and where in memory their rows of the down projection begin."""

    memory: UInt8Array
    rows: Int64Array
    a: Float32Array
    indptr: Int32Array | None
    tokens: Int32Array | None


class RoundedDown:
    """Keeps a layer's activations, and the rows that will be multiplied with them, until all of a
    token's are known.

    So a layer that is brought through DRAM in parts is read once.

    format  the NumberFormat of rows of the down projection; scales: TokenScales
    room    uint8: for rows whose memory is needed again, of all of a layer's neurons
    """

    def __init__(
        self, config: FFNConfig, format: NumberFormat, scales: TokenScales, room: UInt8Array
    ) -> None:
        self.format, self.scales, self.room = format, scales, room
        self.width, self.filled = format.row_bytes(config.hidden_size), 0
        self.parts: list[_Part] = []

    def begin(self, n_tokens: int) -> None:
        """The tokens that follow are other ones, so many."""
        self.scales.begin(n_tokens)
        self.parts, self.filled = [], 0

    def take(
        self, memory: UInt8Array, rows: Int64Array, a: Float32Array, part: Selection, passing: bool
    ) -> None:
        """Keep the activations ``a`` of a Selection's neurons, whose rows begin at ``rows`` (n,) of
        memory; passing: that is overwritten before ``add`` is called."""
        a = self.scales.take(a, part.units, part.indptr, part.tokens)
        if passing:
            n, width = len(rows), self.width
            places = self.filled + np.arange(n, dtype=np.int64) * width
            kernels.copy_rows(memory, rows, self.room, places, np.full(n, width))
            memory, rows, self.filled = self.room, places, self.filled + n * width
        self.parts.append(_Part(memory, rows, a, part.indptr, part.tokens))

    def add(self, y: Float32Array) -> None:
        """y (T, d_model) += the down projection of all that was taken."""
        for memory, rows, a, indptr, tokens in self.parts:
            a = self.scales.round(a, tokens)
            kernels.sparse_down(memory, rows, self.format, a, y, indptr, tokens)
        self.parts = []
