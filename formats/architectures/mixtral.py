"""Mixtral (Jiang et al. 2024): Mistral with 8 large experts, 2 of them for each token."""

from dataclasses import replace

from . import hugging_face, mistral
from .hugging_face import mixture

MODEL_TYPES = ("mixtral",)
MOE = "model.layers.{}.block_sparse_moe"
NAMES = {**hugging_face.NAMES, "layers.{}.router.weight": f"{MOE}.gate.weight"}
FFN = {
    part: f"{MOE}.experts.{{expert}}.{name}.weight"
    for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}


def model_config(config):
    """The ModelConfig of a MixtralConfig (a dict). Raises FormatError."""
    return replace(mistral.model_config(config), **mixture(config, "intermediate_size"))
