"""Rotary positions as GGUF's metadata and tensors say them, under Hugging Face's names."""

import math
from typing import Any

from ...bounded_json import JsonObject
from ...errors import FormatError, shown
from .form import GgufForm
from .header import Header

# Tensors with a factor of each dimension, which become a part of the config.
SCALINGS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def partial_rotary_factor(form: GgufForm, header: Header, head_dim: int | None) -> float:
    """The share of each head that is rotary. Raises FormatError where it has to be 1."""
    turned = header.of("rope.dimension_count")
    if not turned or not head_dim or turned == head_dim:
        return 1.0
    if not form.partly_rotary or not 0 < turned < head_dim:
        raise FormatError(
            f"{header.path}: rope.dimension_count {shown(turned)} of heads of "
            f"{shown(head_dim)} is not supported for {form.architecture}"
        )
    # The next larger number, so that its product with head_dim is not rounded below ``turned``.
    return math.nextafter(turned / head_dim, math.inf)


def rope_parameters(header: Header) -> JsonObject:
    """The kind of rotary positions, and its parameters."""
    base = header.of("rope.freq_base", float)
    return {"rope_theta": 10000.0 if base is None else base, **_scaling(header)}


def _scaling(header: Header) -> JsonObject:
    kind = header.of("rope.scaling.type", str, "linear")  # llama.cpp's default
    factor = header.of("rope.scaling.factor", float)
    if kind == "linear" and not factor:
        kind = "none"
    if "rope_freqs.weight" in header.tensors:  # Llama 3's scaling
        factors = header.vector("rope_freqs.weight")
        return _by_dimension(header, kind, factors, factors, 1.0)
    if {"rope_factors_short.weight", "rope_factors_long.weight"} <= header.tensors.keys():
        short, long = (header.vector(f"rope_factors_{which}.weight") for which in ("short", "long"))
        of_scores = header.of("rope.scaling.attn_factor", float)
        return _by_dimension(header, kind, short, long, of_scores)
    if kind == "none":
        return {"rope_type": "default"}
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["beta_fast"] = header.of("rope.scaling.yarn_beta_fast", float, 32.0)
        scaling["beta_slow"] = header.of("rope.scaling.yarn_beta_slow", float, 1.0)
    return scaling


def _by_dimension(header: Header, kind: str, short: Any, long: Any, of_scores: Any) -> JsonObject:
    """A scaling by a factor of each dimension. Raises FormatError where it comes beside another."""
    if kind not in ("none", "longrope"):
        raise FormatError(
            f"{header.path}: rope.scaling.type {shown(kind)} beside factors of each "
            "dimension is not supported"
        )
    return {
        "rope_type": "longrope", "short_factor": short, "long_factor": long,
        "attention_factor": of_scores,
    }  # fmt: skip
