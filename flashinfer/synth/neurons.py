"""Synthetic models whose neurons fire and stay silent as those of a ReLU model do.

A neuron's first row (up, or gate) reads the code through b_i, and everything else faintly, so that
its pre-activation is approximately b_i . c_t - threshold. The predictor's first map is Q^T, its
second has the rows b_i. The threshold is a bias. In a model without biases every token also brings
a constant, in one more direction.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from flashinfer.calibration.traces import record_of_uses
from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.bundle.calibration import LayerCalibration
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.errors import UserError
from flashinfer.synth.maker import (
    CHUNK_VALUES,
    SIMULATED_TOKENS,
    Code,
    Maker,
    at_speed,
    code_width,
    directions,
    turning,
)

NOISE = 0.004  # spread of the part of a pre-activation that the predictor misses, of its own spread
MARGIN = 0.024  # how much lower the predictor's threshold lies: six times the noise
WINDOW = 5  # tokens; a neuron is fresh if none of the last five used it


def find_code(active: float, fresh: float, width: int, random: np.random.Generator) -> Code:
    """The Code of neurons of which the share ``active`` fires and the share ``fresh`` is fresh.

    Raises UserError where there is no such Code.
    """
    if not 0 < active < 0.5:
        raise UserError(f"an active share of {active} is not between 0 and 0.5")
    turns, b = turning(random, width), directions(random, 4096, width)

    def new(code: Code) -> float:
        """Set the code's threshold for ``active``; return the share that is fresh then."""
        z = code.at(np.arange(SIMULATED_TOKENS)) @ b.T
        code.threshold = float(np.quantile(z, 1 - active))
        fires = z > code.threshold
        recent = np.zeros_like(fires)
        for k in range(1, WINDOW + 1):
            recent[k:] |= fires[:-k]
        return float((fires & ~recent)[WINDOW:].mean())

    code = at_speed(*turns, new, fresh)
    if fresh > new(code) * 1.02:
        raise UserError(
            f"a fresh share of {fresh} cannot be had: with {active} active, at most "
            f"{new(code):.4f} are new after {WINDOW} tokens"
        )
    return code


class NeuronMaker(Maker):
    """Makes models whose neurons fire with the share ``active``, ``fresh`` of a layer anew."""

    def __init__(self, model: ModelConfig, active: float, fresh: float, seed: int) -> None:
        self.ffn, *others = {model.layers[i].ffn: None for i in model.with_neurons}
        if others:
            raise UserError("a synthetic model without experts has the same neurons in each layer")
        random = np.random.default_rng([seed, 0])
        super().__init__(model, find_code(active, fresh, code_width(model), random), random, seed)
        self.rank = self.reserved.shape[1]
        b = directions(random, self.ffn.neurons, self.width)
        z = self.code.at(np.arange(SIMULATED_TOKENS)) @ b.T
        self.found = record_of_uses(
            z > self.code.threshold - MARGIN,
            active=float((z > self.code.threshold).mean()),
            rank=self.rank,
        )
        firing = active * self.ffn.neurons
        self.down_spread = self.block_size / np.sqrt(max(1, firing) * self.d) / 0.4

    def record(self, layer: int) -> LayerCalibration | None:
        if not self.model.layers[layer].ffn.neurons:
            return None
        # Only the tokens write to the code, so that every guess one layer early is right.
        return replace(self.found, guessed=float(layer > 0))

    def own_chunks(
        self, name: str, layer: int, shape: tuple[int, ...], random: np.random.Generator
    ) -> Iterable[Float32Array] | None:
        """Predictors and bundles."""
        if name == "ffn.bundles":
            return self._bundles(layer, shape, random)
        if name == "predictor.a":
            return [self.reserved.T / self.code_length]
        if name == "predictor.b":
            return self._predictor_b(layer)
        if name == "predictor.bias" and self.constant.size:
            return [np.zeros(shape, dtype=np.float32)]
        if name in ("predictor.bias", "ffn.gate_bias" if self.ffn.gated else "ffn.up_bias"):
            margin = MARGIN if name == "predictor.bias" else 0.0
            return [np.full(shape, self._bias(margin), dtype=np.float32)]
        return None

    def _predictor_b(self, layer: int) -> Iterator[Float32Array]:
        for _, b in self._directions(layer):
            constant = np.full((len(b), self.constant.shape[1]), self._bias(MARGIN))
            yield np.concatenate([b, constant], axis=1, dtype=np.float32)

    def _bias(self, margin: float) -> float:
        return margin - self.code.threshold

    def _directions(self, layer: int) -> Iterator[tuple[int, Float32Array]]:
        """Yield (first, b_i (n, width)): the same for the bundles and for the predictor."""
        random = np.random.default_rng([self.seed, 2, layer])
        step = max(1, CHUNK_VALUES // 8 // self.d)
        for first in range(0, self.ffn.neurons, step):
            n = min(step, self.ffn.neurons - first)
            yield first, directions(random, n, self.width)

    def _bundles(
        self, layer: int, shape: tuple[int, ...], random: np.random.Generator
    ) -> Iterator[Float32Array]:
        noise = NOISE / np.sqrt(self.d)
        for _, b in self._directions(layer):
            rows = random.standard_normal((len(b), shape[1]), dtype=np.float32)
            first, down = rows[:, : self.d], rows[:, -self.d :]
            first *= np.float32(noise)
            first += (b / self.code_length) @ self.q.T
            first += self._bias(0.0) / self.code_length * self.constant.sum(axis=1)
            if self.ffn.gated:
                rows[:, self.d : -self.d] /= np.float32(np.sqrt(self.d))
            down *= np.float32(self.down_spread)
            down -= down @ self.reserved @ self.reserved.T
            yield rows
