"""Several hidden states of a token, of which each layer computes one (AltUp)."""

from dataclasses import dataclass, field

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.layers.altup import AltUpConfig
from flashinfer.paper.gate_cut import ordered_sums
from flashinfer.paper.interfaces import Tap
from flashinfer.transformer.mixer import Parts
from flashinfer.transformer.norm import Norm
from flashinfer.transformer.weights import Linear

LEAST_SQUARE = 1e-5  # the least mean square by which a hidden state is scaled


@dataclass
class AltUp:
    """A layer's: the hidden states that it predicts, and what corrects them.

    norm, router   make numbers within -1 and 1, as many as there are states, of one of them
    predict        makes a coefficient of these for each state made and state read
    correct        makes a factor for each state, which 1 is added to
    correct_scale  (d_model,) float32, or None
    """

    config: AltUpConfig
    norm: Norm
    router: Linear
    predict: Linear
    correct: Linear
    correct_scale: Float32Array | None
    tap: Tap | None = field(default=None, init=False)

    @classmethod
    def made(cls, config: AltUpConfig, parts: Parts) -> "AltUp":
        """That of a layer."""
        router, predict, correct = (
            parts.linear(f"altup.{name}") for name in ("router", "predict", "correct")
        )
        scale = parts.vector("altup.correct_scale") if config.correct_scale else None
        return cls(config, parts.norm(config.norm, "altup.norm"), router, predict, correct, scale)

    def predicted(self, h: Float32Array) -> Float32Array:
        """States (T, n, d_model) of the layer before -> what they are thought to become."""
        n = self.config.states
        coefficients = self.predict(self._modalities(h[:, self.config.active]))
        coefficients = coefficients.reshape(-1, n, n)  # (T, state made, state read)
        found = np.empty_like(h)
        for made in range(n):  # one product after the other, so that sums have one order
            y = h[:, 0] * coefficients[:, made, :1]
            for read in range(1, n):
                y += h[:, read] * coefficients[:, made, read, None]
            found[:, made] = y + h[:, made]
        if self.tap:
            self.tap(altup_active=found[:, self.config.active])
        return found

    def corrected(self, predicted: Float32Array, active: Float32Array) -> Float32Array:
        """Predicted states (T, n, d_model), and what the layer made of the active one (T, d_model)
        -> states (T, n, d_model)."""
        factors = self.correct(self._modalities(active)) + np.float32(1)  # (T, n)
        innovation = active - predicted[:, self.config.active]
        return innovation[:, None] * factors[:, :, None] + predicted

    def read(self, states: Float32Array) -> Float32Array:
        """Of the corrected states (T, n, d_model) what the block for the token's own reads."""
        active = np.ascontiguousarray(states[:, self.config.active])
        return active if self.correct_scale is None else active * self.correct_scale

    def _modalities(self, x: Float32Array) -> Float32Array:
        """x (T, d_model) -> (T, n)."""
        x = self.norm(np.ascontiguousarray(x)) * np.float32(1 / self.config.hidden_size)
        found = self.router(x)
        kernels.activate(found, "cap", 1.0)  # tanh
        return found


@dataclass
class HiddenStates:
    """How several hidden states are made of a token's embedding, and one of them at the end.

    into, out  a matrix (d_model, d_model) for each of them but the first
    """

    into: list[Linear]
    out: list[Linear]

    def begin(self, h: Float32Array) -> Float32Array:
        """Embeddings (T, d_model) -> states (T, n, d_model), of one size each."""
        return np.stack([h, *(_as_large(linear(h), h) for linear in self.into)], axis=1)

    def end(self, states: Float32Array) -> Float32Array:
        """The mean of states (T, n, d_model) that are turned back: (T, d_model)."""
        first = np.ascontiguousarray(states[:, 0])
        total = first.copy()
        for number, linear in enumerate(self.out, 1):
            total += _as_large(linear(np.ascontiguousarray(states[:, number])), first)
        return total / np.float32(len(self.out) + 1)


def _as_large(x: Float32Array, other: Float32Array) -> Float32Array:
    """x (T, d_model), scaled to the root mean square of another."""
    wanted = np.sqrt(_mean_square(other))
    there = np.sqrt(np.maximum(_mean_square(x), np.float32(LEAST_SQUARE)))
    return x * wanted[:, None] / there[:, None]


def _mean_square(x: Float32Array) -> Float32Array:
    """x (T, d_model) -> (T,) float32."""
    return (ordered_sums((x * x).T) / x.shape[1]).astype(np.float32)
