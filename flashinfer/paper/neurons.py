"""What a layer's neurons compute, wherever in memory their rows lie."""

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import AnyArray, Float32Array, Int32Array, UInt8Array
from flashinfer.formats.layers.ffn import FFNConfig
from flashinfer.formats.number_formats import NumberFormat
from flashinfer.paper.activations_norm import ActivationsNorm
from flashinfer.paper.gate_cut import cut_gates
from flashinfer.paper.interfaces import Columns, Tap
from flashinfer.paper.rounded_down import RoundedDown
from flashinfer.paper.selection import Selection


def neurons_of(units: AnyArray, each: int) -> AnyArray:
    """The neurons of units (n,) that have ``each`` of them, side by side -> (n * each,)."""
    if each == 1:
        return units
    return (units[:, None] * np.int64(each) + np.arange(each)).ravel()


def working_bytes(config: FFNConfig) -> int:
    """Bytes of activations that a token takes on its way through a layer's FFN."""
    # Experts come one by one; else all neurons' activations are there at once.
    active = config.unit_neurons if config.reads_experts else config.neurons
    each = (24 if config.gated else 16) + (4 if config.rounded else 0)
    return each * (active + config.shared_d_ffn)


class Neurons:
    """The arithmetic of an FFN: y = down(a) + down_bias, where a neuron's

        a_i = activation(up_i . x + up_bias_i), or where the model is gated
        a_i = activation(gate_i . x + gate_bias_i) * (up_i . x + up_bias_i)

    and all of a token's a_i may be normalised before the down projection.
    It is given in units: of one neuron each, or of a mixture's expert, whose neurons lie side by
    side.

    config  FFNConfig; format: the bundles' NumberFormat
    biases  {"gate", "up": (neurons,), "down": (d_model,) or, of experts, (experts, d_model)
            float32, or None}
    norm    ActivationsNorm, or None
    rounded_down  RoundedDown, where activations are rounded, or None
    cut     ("cats", 0.1): what a model that has no silent neurons takes as silent; None: nothing
    """

    def __init__(
        self,
        config: FFNConfig,
        format: NumberFormat,
        biases: dict[str, Float32Array | None],
        cut: tuple[str, float] | None = None,
        norm: ActivationsNorm | None = None,
        rounded_down: RoundedDown | None = None,
    ) -> None:
        self.config, self.format, self.biases, self.cut = config, format, biases, cut
        self.norm, self.rounded_down = norm, rounded_down
        self.first = "gate" if config.gated else "up"  # what decides whether a neuron is silent
        self.width = format.row_bytes(config.hidden_size)  # bytes of each part of a bundle
        self.down_at = self.width * (config.parts - 1)
        self.tap: Tap | None = None

    def of(self, units: AnyArray) -> AnyArray:
        """The neurons of units (n,) -> (n * neurons of each,)."""
        return neurons_of(units, self.config.unit_neurons)

    def one_by_one(self, selection: Selection) -> bool:
        """Large units of several tokens: each is multiplied with its own tokens only."""
        return self.config.unit_neurons > 1 and selection.indptr is not None

    def begin(self, n_tokens: int) -> None:
        """So many other tokens follow: called before their first neurons are added."""
        if self.rounded_down is not None:
            self.rounded_down.begin(n_tokens)
        elif self.norm is not None:
            self.norm.begin(n_tokens)

    def finish(self, selection: Selection, y: Float32Array) -> None:
        """What is left to do on y (T, d_model) when all neurons of a Selection are added."""
        if self.rounded_down is not None:
            self.rounded_down.add(y)
        elif self.norm is not None:
            self.norm.divide(y)
        self.add_bias(selection, y)

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
        """y += down(activations) of the units of ``part``, a Selection, whose neurons begin at
        ``rows`` (units, neurons of each) of memory; apart as in ``activations``, passing as in
        ``add_down``."""
        down = rows + (apart or self.width) * (self.config.parts - 1)
        if not self.one_by_one(part):
            neurons = self.of(part.units)
            a = self.activations(memory, rows.ravel(), x, neurons, part.indptr, part.tokens, apart)
            self.add_down(memory, down.ravel(), a, part, y, passing)
            return
        for i, pairs in enumerate(part.pairs()):
            tokens = part.tokens[pairs]
            neurons, its_y = self.of(part.units[i : i + 1]), y[tokens]
            a = self.activations(memory, rows[i], x[tokens], neurons, apart=apart)
            a *= part.weights[pairs]
            kernels.sparse_down(memory, down[i], self.format, a, its_y)
            y[tokens] = its_y

    def activations(
        self,
        memory: UInt8Array,
        rows: AnyArray,
        x: Float32Array,
        neurons: AnyArray,
        indptr: Int32Array | None = None,
        tokens: Int32Array | None = None,
        apart: int | None = None,
    ) -> Float32Array:
        """What ``neurons``, whose first parts begin at ``rows``, give the down projection.

        x (T, d_model) -> (n, T), or with indptr and tokens as ``kernels.sparse_up``; apart: bytes
        from each part of a neuron to its next; None: a bundle, where it follows at once.
        """
        config, (method, cut) = self.config, self.cut or (None, 0.0)
        a = self.products(self.first, memory, rows, x, neurons, indptr, tokens)
        self._tell(self.first, a, neurons, indptr, tokens, x)
        shut = a <= cut if method == "threshold" else None
        if config.gate_cut is not None:
            cut_gates(a, config.gate_cut)
        if config.limit is not None:
            np.minimum(a, config.limit, out=a)
        kernels.activate(a, config.activation, config.threshold)
        if method == "cats":
            shut = np.abs(a) <= cut
        if shut is not None:
            a[shut] = 0
        if config.gated:
            self._multiply_up(a, memory, rows + (apart or self.width), x, neurons, indptr, tokens)
        if method == "teal":
            a[np.abs(a) <= cut] = 0
        self._tell("activations", a, neurons, indptr, tokens, x)
        return a

    def _tell(
        self,
        value: str,
        a: Float32Array,
        neurons: AnyArray,
        indptr: Int32Array | None,
        tokens: Int32Array | None,
        x: Float32Array,
    ) -> None:
        """Tell the tap a value of a dense layer's neurons; experts have too many."""
        if self.tap and not self.config.router:
            self.tap(**{value: Columns.of(a, neurons, indptr, tokens, len(x))})

    def _multiply_up(
        self,
        a: Float32Array,
        memory: UInt8Array,
        rows: AnyArray,
        x: Float32Array,
        neurons: AnyArray,
        indptr: Int32Array | None,
        tokens: Int32Array | None,
    ) -> None:
        skips = (self.config.sparse or self.cut) and not self.config.matrices
        if skips and len(x) == 1 and not self.tap:  # a gate that is shut needs no up
            open_ = np.flatnonzero(a)
            a[open_] *= self._up(self.products("up", memory, rows[open_], x, neurons[open_]))
        else:
            up = self.products("up", memory, rows, x, neurons, indptr, tokens)
            self._tell("up", up, neurons, indptr, tokens, x)
            a *= self._up(up)

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
        """part . x + its bias, for the "gate" or "up" of ``neurons``; as ``activations``."""
        bias = self.bias_of(part, neurons)
        return kernels.sparse_up(
            memory, rows, self.format, x, bias, indptr, tokens, self.config.rounded
        )

    def bias_of(self, part: str, neurons: AnyArray) -> Float32Array | None:
        """The biases (n,) of the "gate" or "up" of ``neurons``, or None."""
        bias = self.biases[part]
        return None if bias is None else bias[neurons]

    def _up(self, up: Float32Array) -> Float32Array:
        """What a gate is multiplied with, of up . x + its bias."""
        if self.config.limit is not None:
            np.clip(up, -self.config.limit, self.config.limit, out=up)
            up += 1
        return np.maximum(up, 0, out=up) if self.config.up_relu else up

    def add_down(
        self,
        memory: UInt8Array,
        rows: AnyArray,
        a: Float32Array,
        part: Selection,
        y: Float32Array,
        passing: bool = False,
    ) -> None:
        """y += down(a), a as ``activations`` gives it, for rows of the down projection. Where
        activations are normalised, a is overwritten; where they are rounded, ``finish`` adds them.

        passing  the memory is overwritten before ``finish`` is called
        """
        if self.rounded_down is not None:
            self.rounded_down.take(memory, rows, a, part, passing)
            return
        if self.norm is not None:
            a = self.norm.take(a, self.of(part.units), part.indptr, part.tokens)
        if part.weights is not None:
            # Each unit's weight counts for all its neurons, or each pair's for its own.
            if part.indptr is None:
                a = a * np.repeat(part.weights, self.config.unit_neurons)[:, None]
            else:
                a = a * part.weights
        kernels.sparse_down(memory, rows, self.format, a, y, part.indptr, part.tokens)

    def add_bias(self, selection: Selection, y: Float32Array) -> None:
        """y += the down projection's bias, of experts by their weights."""
        bias = self.biases["down"]
        if bias is None:
            return
        if not self.config.router:
            y += bias
        elif selection.indptr is None:
            for unit, weight in zip(selection.units, selection.weights, strict=True):
                y += weight * bias[unit]
        else:
            for unit, pairs in zip(selection.units, selection.pairs(), strict=True):
                y[selection.tokens[pairs]] += selection.weights[pairs, None] * bias[unit]
