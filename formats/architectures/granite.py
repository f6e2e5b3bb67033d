"""Granite 3 (IBM 2024): Llama with scaled embeddings, scores, sums and logits."""

from ..config import ModelConfig, Options, model_of
from ..fields import Fields, flag, number
from . import hugging_face
from .hugging_face import FFN, NAMES, attention_biases, usual_options

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("granite",)
MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
DEFAULTS = {
    **hugging_face.LLAMA,
    "attention_bias": False,
    "mlp_bias": False,
    **MULTIPLIERS,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a GraniteConfig (a dict). Raises FormatError."""
    return model_of(
        **usual_options(config),
        **attention_biases(config),
        **multipliers(config),
        ffn_bias=flag(config, "mlp_bias"),
    )


def multipliers(config: Fields) -> Options:
    """``model_of``'s options for MULTIPLIERS."""
    return {
        "embedding_scale": number(config, "embedding_multiplier"),
        "attention_scale": number(config, "attention_multiplier"),
        "residual_scale": number(config, "residual_multiplier"),
        "logit_scale": 1 / number(config, "logits_scaling"),
    }
