"""Llama 1 to 3.2 (Touvron et al. 2023) and ReLULLaMA."""

from ..config import ModelConfig, model_of
from ..fields import Fields, flag
from . import hugging_face
from .hugging_face import FFN, NAMES, attention_biases, usual_options

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("llama",)
DEFAULTS = {**hugging_face.LLAMA, "attention_bias": False, "mlp_bias": False}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a LlamaConfig (a dict). Raises FormatError."""
    return model_of(
        **usual_options(config),
        **attention_biases(config),
        ffn_bias=flag(config, "mlp_bias"),
    )
