"""Synthetic mixtures of experts, whose routers show the locality of real ones.

A router's row e reads the code through b_e. It also reads the constant that every token brings, or
has a bias, so that some experts are liked more than others. From the second layer on it reads a few
dimensions that only the layer before it writes to, so that a guess made before that layer can be
wrong. How fast the code turns determines how many of a token's experts the token before it used.

Published figures of real routers: of Mixtral's top 2 of 8, neighbouring tokens share at least one
in 61 to 67 % of the cases in layer 15, by chance 46 % (Jiang et al. 2024, section 5). Measurements
that other engines published: of 512 experts, 10 per token, the most used sixteenth of a layer
covers about a tenth of the uses, and a least recently used cache of 64 hits 67 %, of 128 81 %; the
next layer's router, asked one layer early, is right in about three of four cases.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np

from flashinfer.calibration.traces import routing_record
from flashinfer.formats.arrays import BoolArray, Float32Array
from flashinfer.formats.bundle.calibration import LayerCalibration
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.errors import UserError
from flashinfer.paper.router import SURE
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

LIKED = 0.3  # spread of how much experts are liked, relative to the spread of b_e . c_t
UNSEEN = 0.25  # spread of the part of a router's scores that a guess does not see
UNSEEN_WIDTH = 4  # dimensions per layer that bring that part
GATED_SIZE = 0.6  # size of silu(g) u, where g and u are normally distributed


class ExpertMaker(Maker):
    """Makes models where the token before used the share ``repeated`` of a token's experts."""

    def __init__(self, model: ModelConfig, repeated: float, seed: int) -> None:
        if not 0 < repeated < 1:
            raise UserError(f"a repeated share of {repeated} is not between 0 and 1")
        routers = [layer.ffn.router for layer in model.layers if layer.ffn.router]
        self.experts, self.per_token = routers[0].experts, routers[0].experts_per_token
        self.early = routers[0].early
        random = np.random.default_rng([seed, 0])
        turns = turning(random, code_width(model))
        b, liked = self._router(random, code_width(model))
        unseen = random.standard_normal((SIMULATED_TOKENS, self.experts), dtype=np.float32)

        def new(code: Code) -> float:
            uses = self._chosen(code, b, liked, UNSEEN * unseen)
            return 1 - float((uses[1:] & uses[:-1]).sum() / uses[1:].sum())

        code = at_speed(*turns, new, 1 - repeated)
        if new(code) < 0.98 * (1 - repeated):
            raise UserError(
                f"a repeated share of {repeated} cannot be had: {self.per_token} of "
                f"{self.experts} experts repeat {1 - new(code):.2f} by chance"
            )
        layers = model.num_hidden_layers
        super().__init__(model, code, random, seed, beside=UNSEEN_WIDTH * layers)
        self.unseen_rows = UNSEEN / (0.01 * np.sqrt(UNSEEN_WIDTH))

    def _router(self, random: np.random.Generator, width: int) -> tuple[Float32Array, Float32Array]:
        """(b_e (experts, width), how much each expert is liked (experts,))."""
        b = directions(random, self.experts, width)
        return b, LIKED * random.standard_normal(self.experts, dtype=np.float32)

    def _layer_router(self, layer: int) -> tuple[Float32Array, Float32Array]:
        return self._router(np.random.default_rng([self.seed, 2, layer]), self.width)

    def _chosen(
        self, code: Code, b: Float32Array, liked: Float32Array, unseen: Float32Array
    ) -> BoolArray:
        """Which experts the simulated tokens use, (T, experts)."""
        return largest(self._seen(code, b, liked) + unseen, self.per_token)

    def _seen(self, code: Code, b: Float32Array, liked: Float32Array) -> Float32Array:
        """The part of the scores (T, experts) that a guess one layer early sees."""
        return code.at(np.arange(SIMULATED_TOKENS)) @ b.T + liked

    def _summed(self, layer: int) -> float:
        """The size of the sum over a layer's neurons, or over those of the experts chosen, with
        weights of 1 / per_token each."""
        ffn = self.model.layers[layer].ffn
        chosen = ffn.router.experts_per_token if ffn.router else 1
        return float(np.sqrt(ffn.d_ffn / chosen)) * GATED_SIZE

    def record(self, layer: int) -> LayerCalibration | None:
        if not self.model.layers[layer].ffn.router:
            return None
        random = np.random.default_rng([self.seed, 3, layer])
        unseen = random.standard_normal((SIMULATED_TOKENS, self.experts), dtype=np.float32)
        router = self._layer_router(layer)
        seen, sure = self._seen(self.code, *router), math.ceil(SURE * self.per_token)
        scores = seen + UNSEEN * unseen
        uses, weights = largest(scores, self.per_token), np.exp(scores)
        if layer == 0:
            return routing_record(uses, weights)
        return routing_record(uses, weights, largest(seen, self.per_token), largest(seen, sure))

    def own_chunks(
        self, name: str, layer: int, shape: tuple[int, ...], random: np.random.Generator
    ) -> Iterable[Float32Array] | None:
        """Routers and experts."""
        if name == "ffn.bundles":
            return self._bundles(layer, shape, random)
        if name == "router.bias":
            return [self._layer_router(layer)[1]]
        if name == "router.weight":
            b, liked = self._layer_router(layer)
            rows = b @ self.q.T + liked[:, None] * self.constant.sum(axis=1)
            if layer:
                unseen = random.standard_normal((len(b), UNSEEN_WIDTH), dtype=np.float32)
                rows += self.unseen_rows * unseen @ self._unseen(layer - 1).T
            # A router that reads the hidden state as it is finds a code of length 1 there.
            return [rows / np.float32(1 if self.early else self.code_length)]
        return None

    def _unseen(self, layer: int) -> Float32Array:
        """The dimensions (d, UNSEEN_WIDTH) that a layer's experts write to for the next router."""
        return self.beside[:, UNSEEN_WIDTH * layer :][:, :UNSEEN_WIDTH]

    def _bundles(
        self, layer: int, shape: tuple[int, ...], random: np.random.Generator
    ) -> Iterator[Float32Array]:
        step = max(1, CHUNK_VALUES // shape[1])
        unseen, summed = self._unseen(layer), self._summed(layer)
        down_spread = self.block_size / np.sqrt(self.d) / summed
        unseen_spread = 0.01 / summed  # gives each unseen dimension the size 0.01 before norms
        for first in range(0, shape[0], step):
            n = min(step, shape[0] - first)
            rows = random.standard_normal((n, shape[1]), dtype=np.float32)
            down = rows[:, -self.d :]
            rows[:, : -self.d] /= np.float32(np.sqrt(self.d))
            down *= np.float32(down_spread)
            down -= down @ self.reserved @ self.reserved.T
            seen_next = random.standard_normal((n, UNSEEN_WIDTH), dtype=np.float32)
            down += np.float32(unseen_spread) * seen_next @ unseen.T
            yield rows


def largest(scores: Float32Array, n: int) -> BoolArray:
    """Which of the scores are among the n largest of their row, in the shape of ``scores``."""
    least = np.partition(scores, -n, axis=1)[:, -n, None]
    return scores >= least
