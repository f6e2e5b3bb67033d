"""Units that are always used whole, whose matrices lie as the model's source had them."""

import itertools
from collections.abc import Callable

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import AnyArray, Float32Array, Int32Array, UInt8Array
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.formats.layers.ffn import FFNConfig
from flashinfer.formats.number_formats import Matrices
from flashinfer.paper.activations_norm import ActivationsNorm
from flashinfer.paper.interfaces import Stream
from flashinfer.paper.neurons import Neurons
from flashinfer.paper.selection import Selection, Tokens
from flashinfer.paper.streamed import streamed_linear
from flashinfer.paper.unit_store import UnitStore
from flashinfer.paper.whole import Whole

FILL_BYTES = 8 << 20  # read at a time
NOWHERE = np.empty(0, dtype=np.int64)  # where matrices begin that are not in memory


class WholeUnits(Neurons):
    """The arithmetic of an FFN, or of each of a mixture's experts, by its matrices.

    A unit's down projection is multiplied row by row, as all others are, where Neurons adds a
    neuron's column after the other: nothing has to be turned, and no weight rounded again.

    format  Matrices; the others as in Neurons
    """

    def __init__(
        self,
        config: FFNConfig,
        format: Matrices,
        biases: dict[str, Float32Array | None],
        norm: ActivationsNorm | None = None,
    ) -> None:
        super().__init__(config, format, biases, norm=norm)
        self.matrices = format
        self.order = {part: number for number, part in enumerate(format.parts)}
        self.width = self.down_at = 0  # all that a unit has is found from where it begins

    def one_by_one(self, selection: Selection) -> bool:
        """Each is multiplied with its own tokens only."""
        return True

    def add(
        self,
        memory: UInt8Array,
        rows: AnyArray,
        x: Float32Array,
        part: Selection,
        y: Float32Array,
        apart: int | None = None,
        passing: bool = False,
    ) -> None:
        """As ``Neurons.add``; rows (units, matrices)."""
        if part.indptr is None:
            for i, starts in enumerate(rows):
                out = self.outputs(memory, starts, part.units[i], x)
                y += out if part.weights is None else part.weights[i] * out
            return
        for i, pairs in enumerate(part.pairs()):
            tokens = part.tokens[pairs]
            out = self.outputs(memory, rows[i], part.units[i], x[tokens])
            y[tokens] += part.weights[pairs, None] * out

    def outputs(
        self, memory: UInt8Array, starts: AnyArray, unit: int, x: Float32Array
    ) -> Float32Array:
        """What the unit whose matrices begin at ``starts`` (matrices,) of memory gives for x
        (T, d_model): the same shape, without the down projection's bias."""
        neurons = self.of(np.array([unit]))
        a = self.activations(memory, starts, x, neurons)
        if self.norm is not None:
            a = self.norm.take(a, neurons)
        a = np.ascontiguousarray(a.T)  # (T, neurons)
        if self.norm is not None:
            self.norm.divide(a)
        return self.linear("down", memory, starts, a)

    def finish(self, selection: Selection, y: Float32Array) -> None:
        """As ``Neurons.finish``; all of a unit's activations are there, and normalised already."""
        self.add_bias(selection, y)

    def products(
        self,
        part: str,
        memory: UInt8Array,
        rows: AnyArray,
        x: Float32Array,
        neurons: AnyArray,
        indptr: Int32Array | None = None,
        tokens: Int32Array | None = None,
    ) -> Float32Array:
        """part . x + its bias, for the "gate" or "up" of the unit whose matrices begin at ``rows``
        (matrices,): (n, T)."""
        bias = self.bias_of(part, neurons)
        return np.ascontiguousarray(self.linear(part, memory, rows, x, bias).T)

    def linear(
        self,
        part: str,
        memory: UInt8Array,
        starts: AnyArray,
        x: Float32Array,
        bias: Float32Array | None = None,
    ) -> Float32Array:
        """x (T, columns) times one of a unit's matrices, which begin at ``starts`` of memory."""
        described = self.matrices.parts[part]
        at = int(starts[self.order[part]])
        data = memory[at : at + described.nbytes].reshape(described.rows, described.row_bytes)
        matrix = kernels.Matrix(data, described.columns, described.format)
        return kernels.linear(x, matrix, bias, self.config.rounded)


class ResidentUnits(Whole):
    """A layer of which every unit stays in DRAM, as it lies in the file."""

    def fill(self, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Read the layer into the cache's memory. Call it only where it ``fits``."""
        store, tensor = self.store, self.store.units
        units = np.arange(tensor.rows, dtype=np.int32)
        if tensor.runs is not None:
            step = max(1, FILL_BYTES // store.cache.slot_bytes)
            for first in range(0, tensor.rows, step):
                some = units[first : first + step]
                store.wait(store.submit(some, some))
                progress(len(some) * tensor.row_bytes)
            self.offsets = store.offsets(units, units)
            return
        begin = int(store.cache.starts[0])
        for at in range(0, tensor.nbytes, FILL_BYTES):
            size = min(FILL_BYTES, tensor.nbytes - at)  # units begin and end on pages
            read = store.flash.submit_range(
                tensor.offset + at, size, store.cache.memory, begin + at
            )
            store.wait(read)
            progress(size)
        self.offsets = begin + units[:, None] * np.int64(tensor.row_bytes) + store.inside


class StreamedMatrix:
    """One of a unit's matrices, brought through the buffer whenever it is needed.

    following  the StoredTensor that will be streamed next, as far as is known
    """

    def __init__(self, tensor: StoredTensor, store: UnitStore) -> None:
        self.tensor, self.store = tensor, store
        self.following: StoredTensor | None = None

    def linear(
        self, x: Float32Array, bias: Float32Array | None = None, rounded: bool = False
    ) -> Float32Array:
        """x (T, columns) -> (T, rows) float32, as ``kernels.linear``."""
        flash, buffer = self.store.flash, self.store.buffer
        return streamed_linear(flash, self.tensor, buffer, self.following, x, bias, rounded)


class StreamedUnit(WholeUnits):
    """An FFN without experts that is streamed, matrix after matrix, at every token."""

    def __init__(self, store: UnitStore, units: WholeUnits) -> None:
        super().__init__(units.config, units.matrices, units.biases, units.norm)
        self.store, self.units, tensor = store, units, store.units
        self.streamed = {
            name: StreamedMatrix(
                StoredTensor(f"{tensor.name}.{name}", offset, part.rows, part.columns, part.format),
                store,
            )
            for (name, part), offset in zip(
                units.matrices.parts.items(), self._offsets(), strict=True
            )
        }
        streams = list(self.streamed.values())
        for stream, after in itertools.pairwise(streams):
            stream.following = after.tensor

    def _offsets(self) -> list[int]:
        """Where each of the unit's matrices begins on flash."""
        tensor = self.store.units
        if tensor.runs is not None:
            return [run.address for run in tensor.runs]
        return [tensor.offset + part.at for part in self.matrices.parts.values()]

    def streams(self) -> tuple[Stream, ...]:
        """What is streamed at every token, in this order."""
        return tuple(self.streamed.values())

    def __call__(
        self, x: Float32Array, selection: Selection, tokens: Tokens, y: Float32Array
    ) -> None:
        """y (T, d_model) += the FFN of x (T, d_model)."""
        self.tap = self.units.tap
        self.store.cache.misses += len(selection.units)
        y += self.outputs(np.empty(0, dtype=np.uint8), NOWHERE, 0, x)

    def linear(
        self,
        part: str,
        memory: UInt8Array,
        starts: AnyArray,
        x: Float32Array,
        bias: Float32Array | None = None,
    ) -> Float32Array:
        """x (T, columns) times one of the unit's matrices, which is not in memory."""
        return self.streamed[part].linear(x, bias, self.config.rounded)
