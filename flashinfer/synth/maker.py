"""What all synthetic models share: the code, embeddings, attention."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float32Array, Float64Array
from flashinfer.formats.bundle.calibration import LayerCalibration
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.tensors import TensorSpec

BLOCK = 0.02  # size of what a block adds to the hidden state, relative to the state's own
SIMULATED_TOKENS = 400
CHUNK_VALUES = 1 << 21  # float32 values that are made at a time


@dataclass
class Code:
    """The code c_t, and the threshold of a neuron, in spreads of b_i . c_t."""

    frequencies: Float64Array  # (pairs,) in radians per token
    phases: Float64Array  # (pairs,)
    threshold: float = 0.0

    def at(self, positions: AnyArray) -> Float32Array:
        """positions (T,) -> c_t (T, 2 * pairs) of length 1."""
        angles = positions[:, None] * self.frequencies + self.phases
        code = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return (code / np.sqrt(len(self.frequencies))).astype(np.float32)


def code_width(model: ModelConfig) -> int:
    """The dimensions of the code, an even number."""
    return min(64, model.hidden_size // 4 * 2)


def directions(random: np.random.Generator, n: int, width: int) -> Float32Array:
    """Random directions b_i (n, width) for which b_i . c_t has unit spread over t."""
    b = random.standard_normal((n, width), dtype=np.float32)
    return b * (np.sqrt(width) / np.linalg.norm(b, axis=1, keepdims=True))


def turning(random: np.random.Generator, width: int) -> tuple[Float64Array, Float64Array]:
    """(frequencies, phases) of a code that turns at full speed."""
    pairs = width // 2
    return random.uniform(0.2, 1, pairs) * np.pi, random.uniform(0, 2 * np.pi, pairs)


def at_speed(
    frequencies: Float64Array,
    phases: Float64Array,
    found: Callable[[Code], float],
    wanted: float,
) -> Code:
    """The Code at the speed where found(code), which grows with the speed, is ``wanted``.

    frequencies, phases  of the code at full speed, which is returned where even that is too slow
    """
    low, high = 0.0, 1.0
    code = Code(frequencies, phases)
    if found(code) <= wanted:
        return code
    for _ in range(24):
        speed = (low + high) / 2
        code = Code(frequencies * speed, phases)
        low, high = (speed, high) if found(code) < wanted else (low, speed)
    return code


def steps(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (first, rows) of each chunk of a matrix."""
    step = max(1, CHUNK_VALUES // shape[1])
    for first in range(0, shape[0], step):
        yield first, min(step, shape[0] - first)


class Maker(ABC):
    """Makes the values of every tensor, a chunk at a time, the same for the same seed.

    random  the generator that the next random numbers come from
    beside  reserved dimensions, besides the code's own, that only the subclass writes to
    """

    def __init__(
        self,
        model: ModelConfig,
        code: Code,
        random: np.random.Generator,
        seed: int,
        beside: int = 0,
    ) -> None:
        self.model, self.code, self.seed = model, code, seed
        d: int = model.hidden_size
        self.d = d
        self.width = code_width(model)
        constant = 0 if model.layers[0].ffn.ffn_bias else 1
        q = random.standard_normal((d, self.width + constant + beside))
        q -= q.mean(axis=0)  # the layer norm's centring leaves the subspace alone
        self.reserved = np.linalg.qr(q)[0].astype(np.float32)
        self.q, self.constant, self.beside = np.split(
            self.reserved, [self.width, self.width + constant], axis=1
        )
        # |h|^2 = |token|^2 + |code|^2 + |constant|^2 = 2 or 3. The norm brings each part to this:
        self.code_length = np.sqrt(d / (2 + constant))
        # The spread of a block's weights with which the block adds BLOCK of |h|.
        self.block_size = BLOCK * np.sqrt(2 + constant)
        self.tokens_bring_code = not model.learned_positions

    def chunks(self, spec: TensorSpec) -> Iterator[Float32Array]:
        """Yield a tensor's values, whole rows at a time."""
        layer, _, name = spec.name.removeprefix("layers.").partition(".")
        if not layer.isdecimal():
            layer, name = "0", spec.name
        random = np.random.default_rng([self.seed, 1, int(layer), *name.encode()])
        own = self.own_chunks(name, int(layer), spec.shape, random)
        if own is not None:
            yield from own
        elif name in ("o_proj.weight", "out_proj.weight", "shared.down.weight"):
            # Its outputs must stay out of the reserved subspace: (1 - Q Q^T) O.
            spread = np.float32(self.block_size / np.sqrt(self.d * spec.shape[1]))
            o = random.standard_normal(spec.shape, dtype=np.float32) * spread
            yield o - self.reserved @ (self.reserved.T @ o)
        elif name.endswith(("_proj.weight", "shared.gate.weight", "shared.up.weight")):
            yield from self.normal(spec.shape, random, 1 / np.sqrt(self.d))
        elif name == "embed_positions.weight":
            yield self.code.at(np.arange(spec.shape[0])) @ self.q.T
        elif name == "embed_tokens.weight":
            yield from self._embeddings(spec.shape, random)
        elif name == "lm_head.weight" and self.tokens_bring_code:
            for first, n in steps(spec.shape):  # row t + 1 answers to the code of token t
                yield self.code.at(np.arange(first, first + n) - 1) @ self.q.T
        elif name == "final_norm.weight" and not self.tokens_bring_code:
            # Random signs, because a tied head would otherwise repeat the token it was given.
            yield random.choice(np.array([-1, 1], dtype=np.float32), spec.shape)
        elif name in ("conv.weight", "decay"):
            value = 1 / spec.shape[-1] if name == "conv.weight" else -1
            yield np.full(spec.shape, value, dtype=np.float32)
        else:
            ones = name.endswith(("norm.weight", "gated.weight", "skip", "scale", "scales"))
            yield np.full(spec.shape, float(ones), dtype=np.float32)

    @abstractmethod
    def record(self, layer: int) -> LayerCalibration | None:
        """What calibration would find of a layer; None where all of its units are always used."""

    @abstractmethod
    def own_chunks(
        self, name: str, layer: int, shape: tuple[int, ...], random: np.random.Generator
    ) -> Iterable[Float32Array] | None:
        """The values of tensors that the kinds of models do not share; None for all others.

        These are the neurons or experts, and what chooses them.
        """

    def normal(
        self, shape: tuple[int, ...], random: np.random.Generator, spread: float
    ) -> Iterator[Float32Array]:
        """Yield normally distributed values, a chunk at a time."""
        for _, rows in steps(shape):
            yield random.standard_normal((rows, shape[1]), dtype=np.float32) * np.float32(spread)

    def _embeddings(
        self, shape: tuple[int, ...], random: np.random.Generator
    ) -> Iterator[Float32Array]:
        first = 0
        for rows in self.normal(shape, random, 1 / np.sqrt(self.d - self.reserved.shape[1])):
            rows -= rows @ self.reserved @ self.reserved.T
            rows += self.constant.sum(axis=1)
            if self.tokens_bring_code:
                rows += self.code.at(np.arange(first, first + len(rows))) @ self.q.T
            first += len(rows)
            yield rows / np.float32(self.model.embedding_scale)
