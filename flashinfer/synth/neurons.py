"""Synthetic models whose neurons fire, or are silent, as a ReLU model's are.

A neuron's first row (up, or gate) looks at the code through b_i (and, faintly, at everything
else), so its pre-activation is about b_i . c_t - threshold; Q^T is the predictor's first map and
the rows b_i its second. The threshold is a bias; where there is none, every token also brings a
constant, in one direction more.
"""

import numpy as np

from flashinfer.calibration.traces import record_of_uses
from flashinfer.formats.errors import UserError
from flashinfer.synth.maker import (
    CHUNK_VALUES,
    SIMULATED_TOKENS,
    Maker,
    at_speed,
    code_width,
    directions,
    turning,
)

NOISE = 0.004  # spread of a pre-activation that the predictor does not see, of its own spread
MARGIN = 0.024  # by which the predictor's threshold lies lower: six times the noise
WINDOW = 5  # tokens, for which ``fresh`` is meant


def find_code(active, fresh, width, random):
    """The Code whose neurons fire with share ``active``, ``fresh`` of them new at a token."""
    if not 0 < active < 0.5:
        raise UserError(f"an active share of {active} is not between 0 and 0.5")
    turns, b = turning(random, width), directions(random, 4096, width)

    def new(code):
        z = code.at(np.arange(SIMULATED_TOKENS)) @ b.T
        code.threshold = float(np.quantile(z, 1 - active))
        fires = z > code.threshold
        recent = np.zeros_like(fires)
        for k in range(1, WINDOW + 1):
            recent[k:] |= fires[:-k]
        return (fires & ~recent)[WINDOW:].mean()

    code = at_speed(*turns, new, fresh)
    if fresh > new(code) * 1.02:
        raise UserError(
            f"a fresh share of {fresh} cannot be had: with {active} active, at most "
            f"{new(code):.4f} are new after {WINDOW} tokens"
        )
    return code


class NeuronMaker(Maker):
    """Where ``active`` of a layer's neurons fire for a token, ``fresh`` of them anew."""

    def __init__(self, model, active, fresh, seed):
        random = np.random.default_rng([seed, 0])
        super().__init__(model, find_code(active, fresh, code_width(model), random), random, seed)
        self.rank = self.reserved.shape[1]
        b = directions(random, model.d_ffn, self.width)
        z = self.code.at(np.arange(SIMULATED_TOKENS)) @ b.T
        self.found = {
            "active": float((z > self.code.threshold).mean()),
            "rank": self.rank,
            **record_of_uses(z > self.code.threshold - MARGIN),
        }
        firing = active * model.d_ffn
        self.down_spread = self.block_size / np.sqrt(max(1, firing) * self.d) / 0.4

    def record(self, layer):
        """What a calibration would find: nothing but the tokens writes to the code, so that every
        guess one layer early is right."""
        return {**self.found, "guessed": float(layer > 0)}

    def own_chunks(self, name, layer, shape, random):
        """Predictors and bundles."""
        if name == "ffn.bundles":
            return self._bundles(layer, shape, random)
        if name == "predictor.a":
            return [self.reserved.T / self.code_length]
        if name == "predictor.b":
            return self._predictor_b(layer)
        if name == "predictor.bias" and self.constant.size:
            return [np.zeros(shape, dtype=np.float32)]
        if name in ("predictor.bias", "ffn.gate_bias" if self.model.gated else "ffn.up_bias"):
            margin = MARGIN if name == "predictor.bias" else 0.0
            return [np.full(shape, self._bias(margin), dtype=np.float32)]
        return None

    def _predictor_b(self, layer):
        for _, b in self._directions(layer):
            constant = np.full((len(b), self.constant.shape[1]), self._bias(MARGIN))
            yield np.concatenate([b, constant], axis=1, dtype=np.float32)

    def _bias(self, margin):
        return margin - self.code.threshold

    def _directions(self, layer):
        """Yield (first, b_i (n, width)): the same for the bundles and for the predictor."""
        random = np.random.default_rng([self.seed, 2, layer])
        step = max(1, CHUNK_VALUES // 8 // self.d)
        for first in range(0, self.model.d_ffn, step):
            n = min(step, self.model.d_ffn - first)
            yield first, directions(random, n, self.width)

    def _bundles(self, layer, shape, random):
        noise = NOISE / np.sqrt(self.d)
        for _, b in self._directions(layer):
            rows = random.standard_normal((len(b), shape[1]), dtype=np.float32)
            first, down = rows[:, : self.d], rows[:, -self.d :]
            first *= np.float32(noise)
            first += (b / self.code_length) @ self.q.T
            first += self._bias(0.0) / self.code_length * self.constant.sum(axis=1)
            if self.model.gated:
                rows[:, self.d : -self.d] /= np.float32(np.sqrt(self.d))
            down *= np.float32(self.down_spread)
            down -= down @ self.reserved @ self.reserved.T
            yield rows
