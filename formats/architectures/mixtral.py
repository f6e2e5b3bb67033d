"""Mixtral (Jiang et al. 2024): Mistral with 8 large experts, 2 of them for each token."""

from ..config import ModelConfig, model_of
from ..fields import Fields
from . import hugging_face, mistral, mixtures
from .mistral import mistral_options
from .mixtures import FUSED_ROWS, mixture

MODEL_TYPES = ("mixtral",)
MOE, FUSED = "model.layers.{}.block_sparse_moe", "model.layers.{}.mlp"
NAMES = {
    **hugging_face.NAMES,
    "layers.{}.router.weight": f"{MOE}.gate.weight|{FUSED}.gate.weight",
}
FFN = {
    part: f"{MOE}.experts.{{expert}}.{name}.weight"
    for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}
FUSED_FFN = mixtures.FUSED_EXPERTS
DEFAULTS = {
    **hugging_face.without(mistral.DEFAULTS, "layer_types"),
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
ALIASES = {"num_experts": "num_local_experts"}
__all__ = [
    "ALIASES", "DEFAULTS", "FFN", "FUSED_FFN", "FUSED_ROWS", "MODEL_TYPES", "NAMES", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a MixtralConfig (a dict). Raises FormatError."""
    options = mistral_options({**config, "layer_types": None})
    return model_of(**options, **mixture(config, normalised=True))
