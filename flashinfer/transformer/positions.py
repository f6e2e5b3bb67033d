"""Where a token stands: rotary positions and their long forms, scales of queries, and alibi."""

import math
from functools import lru_cache
from typing import Any

import numpy as np

from flashinfer.formats.arrays import Float32Array, Float64Array, Int64Array
from flashinfer.formats.errors import FormatError
from flashinfer.formats.layers.attention import Temperature
from flashinfer.formats.layers.rotary import Rotary
from flashinfer.kernels.fixed_math import cos_sin, log, power

TOGETHER = 64  # positions whose angles are computed at a time
FASTEST = 1e6  # radians a position, beyond which float32 angles would be noise


class RotaryPositions:
    """cos and sin of the angles by which queries and keys are turned.

    The forms whose frequencies depend on the text's length take ``context`` for it: the bits of a
    token do not change while a text grows. Raises FormatError where they are no angles.
    """

    def __init__(self, rotary: Rotary, context: int) -> None:
        with np.errstate(all="ignore"):  # absurd factors become infinite, and are refused
            frequencies, self.scale = frequencies_of(rotary, context)
        if not (np.abs(frequencies) <= FASTEST).all() or not abs(self.scale) < math.inf:
            raise FormatError(f"config: rotary positions of kind {rotary.kind} are no angles")
        self.frequencies = frequencies
        self.begin, self.turns = 0, self._turns(0, 1)  # every layer asks for the same
        self.spans: list[tuple[int, int]] = []
        self.of_spans = self.turns

    def __call__(self, spans: list[tuple[int, int]]) -> tuple[Float32Array, Float32Array]:
        """Of some spans (start, n) of positions, one after the other -> cos, sin (positions,
        dim / 2) float32."""
        if len(spans) == 1:
            return self._of_span(*spans[0])
        if spans != self.spans:
            cosines, sines = zip(*(self._turns(*span) for span in spans), strict=True)
            self.spans, self.of_spans = spans, (np.concatenate(cosines), np.concatenate(sines))
        return self.of_spans

    def _of_span(self, start: int, n: int) -> tuple[Float32Array, Float32Array]:
        """The n positions from ``start`` on -> cos, sin (n, dim / 2) float32."""
        first = start - self.begin
        if not 0 <= first <= first + n <= len(self.turns[0]):
            self.begin, self.turns, first = start, self._turns(start, max(n, TOGETHER)), 0
        cosines, sines = self.turns
        return cosines[first : first + n], sines[first : first + n]

    def _turns(self, start: int, n: int) -> tuple[Float32Array, Float32Array]:
        angles = np.arange(start, start + n)[:, None] * self.frequencies
        cosines, sines = cos_sin(angles)
        return (cosines * self.scale).astype(np.float32), (sines * self.scale).astype(np.float32)


def same_turns(rotary: Rotary, context: int, other: int) -> bool:
    """Whether the angles of positions are the same in two contexts."""
    with np.errstate(all="ignore"):
        (a, scale), (b, other_scale) = (frequencies_of(rotary, n) for n in (context, other))
    return np.array_equal(a, b) and scale == other_scale


def frequencies_of(rotary: Rotary, context: int) -> tuple[Float64Array, float]:
    """Angles per position (dim / 2,) float64, and what cos and sin are multiplied with."""
    p, plain = rotary.parameters, _powers(rotary.base, rotary.dim)
    if rotary.kind == "linear":  # positions squeezed (Chen et al. 2023)
        return plain / p["factor"], 1.0
    if rotary.kind == "dynamic":  # the base grows with the text (NTK-aware scaling)
        most = p["max_position_embeddings"]
        growth = p.get("alpha")  # or once and for all
        if growth is None:
            growth = p["factor"] * max(context, most) / most - (p["factor"] - 1)
        base = rotary.base * power(growth, rotary.dim / max(1, rotary.dim - 2))
        return _powers(base, rotary.dim), 1.0
    if rotary.kind == "proportional":  # the slowest turns are none (Gemma 4)
        turned = np.arange(rotary.dim // 2) < p["turned"]
        return np.where(turned, plain, 0.0) / p["factor"], 1.0
    if rotary.kind == "llama3":
        return _llama3(plain, p), 1.0
    if rotary.kind == "yarn":
        return _yarn(plain, rotary), _yarn_scale(p)
    if rotary.kind == "longrope":
        return _longrope(plain, p, context)
    return plain, 1.0


def _powers(base: float, dim: int) -> Float64Array:
    """base^(-2 i / dim) for i below dim / 2, float64."""
    return np.array([power(base, -2 * i / dim) for i in range(dim // 2)])


def _llama3(plain: Float64Array, p: dict[str, Any]) -> Float64Array:
    """Slow turns are slowed down, fast ones kept, those between blended (Llama 3.1)."""
    turns = p["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / p["factor"])


def _yarn(plain: Float64Array, rotary: Rotary) -> Float64Array:
    """As llama3, blended along the dimensions instead (Peng et al. 2023)."""
    p, dim = rotary.parameters, rotary.dim

    def dimension_of(turns: float) -> float:
        length = p["original_max_position_embeddings"]
        return dim * log(length / (turns * 2 * math.pi)) / (2 * log(rotary.base))

    low, high = dimension_of(p.get("beta_fast") or 32), dimension_of(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2) - low) / (high - low if high != low else 0.001)
    slowed = np.clip(ramp, 0, 1)
    return plain * (1 - slowed + slowed / p["factor"])


def _yarn_scale(p: dict[str, Any]) -> float:
    """What makes up for the flatter softmax of a longer text."""
    factor = p["factor"]
    if p.get("attention_factor") is not None:
        return p["attention_factor"]
    if p.get("mscale") and p.get("mscale_all_dim"):
        return yarn_scale(p["mscale"], factor) / yarn_scale(p["mscale_all_dim"], factor)
    return yarn_scale(1.0, factor)


def yarn_scale(weight: float, factor: float) -> float:
    """0.1 weight log(factor) + 1, of texts that are made ``factor`` times as long."""
    return 0.1 * weight * log(factor) + 1 if factor > 1 else 1.0


def _longrope(plain: Float64Array, p: dict[str, Any], context: int) -> tuple[Float64Array, float]:
    """A factor found by search for each dimension, for short and for long texts (Ding et al.
    2024)."""
    original = p["original_max_position_embeddings"]
    factors = p["long_factor"] if context > original else p["short_factor"]
    scale = p.get("long_mscale" if context > original else "short_mscale")
    scale = p.get("attention_factor") if scale is None else scale
    if scale is None:
        factor = p["factor"]
        scale = math.sqrt(1 + log(factor) / log(original)) if factor > 1 else 1.0
    return plain / np.array(factors), scale


def query_scales(temperature: Temperature, positions: Int64Array) -> Float64Array:
    """What the queries of some positions (T,) are multiplied with: (T,) float64."""
    times, of_each = np.unique(positions // temperature.length, return_inverse=True)
    return np.array([1 + temperature.beta * _log_of(1 + int(n)) for n in times])[of_each]


_log_of = lru_cache(maxsize=1024)(log)  # every layer and token asks for the same few


def alibi_table(heads: int, head_dim: int, context: int) -> Float32Array:
    """What alibi (Press et al. 2021) adds to the scores of each position: (heads, context) float32.

    As Falcon has it: slopes and products in bfloat16, scaled as the scores are.
    """
    closest = 1 << (heads.bit_length() - 1)
    powers = [power(2, -8 / closest * (i + 1)) for i in range(closest)]
    powers += [power(2, -4 / closest * (2 * i + 1)) for i in range(heads - closest)]
    slopes = _bfloat16(np.array(powers, dtype=np.float32))
    table = _bfloat16(slopes[:, None] * _bfloat16(np.arange(context, dtype=np.float32)))
    return table * np.float32(head_dim**-0.5)


def _bfloat16(values: Float32Array) -> Float32Array:
    """float32 values rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


class Positions:
    """Tables of positions that layers share, one of each kind."""

    def __init__(self, context: int) -> None:
        self.context = context
        self.rotary: list[tuple[Rotary, RotaryPositions]] = []
        self.alibi: dict[tuple[int, int], Float32Array] = {}

    def of(self, rotary: Rotary | None) -> RotaryPositions | None:
        """The RotaryPositions of a layer, or None."""
        if rotary is None:
            return None
        for known, positions in self.rotary:
            if known == rotary:
                return positions
        self.rotary.append((rotary, RotaryPositions(rotary, self.context)))
        return self.rotary[-1][1]

    def alibi_of(self, heads: int, head_dim: int) -> Float32Array:
        """What alibi adds to the scores of a layer with such heads."""
        sizes = heads, head_dim
        if sizes not in self.alibi:
            self.alibi[sizes] = alibi_table(*sizes, self.context)
        return self.alibi[sizes]
