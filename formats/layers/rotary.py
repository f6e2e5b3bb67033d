"""Rotary positions: which values of a head are turned, and how fast."""

from dataclasses import dataclass, field
from typing import Any

ROTARY = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021): the first ``dim`` values of a head are turned in pairs
    (i, i + dim / 2), by position times base^(-2 i / dim).

    kind        one of ROTARY: how the frequencies are changed for long texts
    parameters  of that kind, under Hugging Face's names, with
                ``original_max_position_embeddings`` and ``max_position_embeddings``
    """

    dim: int
    base: float
    kind: str = "default"
    parameters: dict[str, Any] = field(default_factory=dict)
