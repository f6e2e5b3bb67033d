"""Qwen3-MoE (Yang et al. 2025), such as Qwen3-30B-A3B: Qwen3 with experts."""

from dataclasses import replace

from . import hugging_face, qwen3
from .hugging_face import mixture

MODEL_TYPES = ("qwen3_moe",)
NAMES = {**hugging_face.NAMES, "layers.{}.router.weight": "model.layers.{}.mlp.gate.weight"}
FFN = hugging_face.EXPERTS


def model_config(config):
    """The ModelConfig of a Qwen3MoeConfig (a dict). Raises FormatError."""
    return replace(qwen3.model_config(config), **mixture(config, normalised=False))
