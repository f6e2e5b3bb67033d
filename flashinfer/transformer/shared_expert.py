"""The expert of a mixture that every token uses."""

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.layers.ffn import FFNConfig
from flashinfer.paper.interfaces import Stream, Tap
from flashinfer.transformer.weights import Weights


class SharedExpert:
    """down(activation(gate x) * (up x)), times sigmoid(weigh x).

    gate, up, down, weigh  weights.Resident or weights.Streamed; gate, without which it is
                           down(activation(up x)), and weigh may be None
    """

    def __init__(
        self,
        config: FFNConfig,
        gate: Weights | None,
        up: Weights,
        down: Weights,
        weigh: Weights | None,
    ) -> None:
        self.config, self.weigh = config, weigh
        self.gate, self.up, self.down = gate, up, down
        self.tap: Tap | None = None

    def streams(self) -> tuple[Stream, ...]:
        """Which of its matrices are streamed at every token, in this order."""
        parts = (self.gate, self.up, self.down)
        return tuple(s for part in parts if part is not None for s in part.streams())

    def __call__(self, x: Float32Array) -> Float32Array:
        """x (T, d_model) -> (T, d_model)."""
        a = (self.up if self.gate is None else self.gate).linear(x)
        kernels.activate(a, self.config.activation, self.config.threshold)
        if self.gate is not None:
            a *= self.up.linear(x)
        y = self.down.linear(a)
        if self.tap:
            self.tap(shared=y)
        if self.weigh is not None:
            share = self.weigh.linear(x)  # (T, 1)
            if self.tap:
                self.tap(shared_gate=share)
            kernels.activate(share, "sigmoid")
            y *= share
        return y
