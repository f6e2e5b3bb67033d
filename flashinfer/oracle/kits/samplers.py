"""Logits and settings of a sampler, what may be drawn with which probability, and what is drawn."""

from typing import Any

import numpy as np

from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.generation.sampling import Sampler
from flashinfer.oracle.kits.draws import uniform

DRAWS = 16  # tokens of each case, all by the same logits
# Settings of a Sampler.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0},
    {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "seed": 1},
    {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "seed": 2},
    {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "seed": 3},
    {"temperature": 1.0, "top_k": 10, "top_p": 1.0, "seed": 4},
    {"temperature": 1.0, "top_k": 1000, "top_p": 1.0, "seed": 5},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "seed": 6},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.05, "seed": 7},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 8},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.6, "seed": 2**64 - 1},
)
VOCABULARY = 64


def sampler_cases() -> list[JsonObject]:
    """The cases: each ``logits`` with each of SETTINGS.

    A case has, beside the settings, ``logits``; ``kept``, the tokens that may be drawn, likeliest
    first, with their ``probabilities``; ``uniform``, the sampler's random numbers; and ``tokens``,
    what is drawn. With temperature 0 nothing is random, and ``kept`` is the token itself.
    """
    return [case_of(logits, settings) for logits in _logits() for settings in SETTINGS]


def _logits() -> list[Float32Array]:
    spread = uniform("samplers, logits", (VOCABULARY,), 8.0)
    peaked = spread.copy()
    peaked[17] += np.float32(20)
    equal = np.zeros(VOCABULARY, dtype=np.float32)
    return [spread, peaked, equal]


def case_of(logits: Float32Array, settings: dict[str, Any]) -> JsonObject:
    """What a Sampler of these settings makes of logits (vocab_size,)."""
    sampler, numbers = Sampler(**settings), Sampler(**settings)
    case: JsonObject = {**settings, "logits": logits.tolist()}
    if settings["temperature"] == 0:
        token = sampler(logits)
        return case | {"kept": [token], "probabilities": [1.0], "uniform": [], "tokens": [token]}
    kept, probabilities = sampler.probabilities(logits)
    return case | {
        "kept": kept.tolist(),
        "probabilities": probabilities.tolist(),
        "uniform": [numbers.uniform() for _ in range(DRAWS)],
        "tokens": [sampler(logits) for _ in range(DRAWS)],
    }
