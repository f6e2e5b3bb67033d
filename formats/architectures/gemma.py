"""Gemma (2024): Llama with scaled embeddings and norms stored less one."""

import math

from ..config import ModelConfig, flag
from .hugging_face import FFN, NAMES, usual_options

__all__ = ["FFN", "MODEL_TYPES", "NAMES", "NORM_LESS_ONE", "model_config"]
MODEL_TYPES = ("gemma",)
NORM_LESS_ONE = True


def model_config(config):
    """The ModelConfig of a GemmaConfig (a dict). Raises FormatError."""
    # Gemma was trained with the tanh form of gelu, also where its first configs say "gelu".
    config = {
        "tie_word_embeddings": True,
        **config,
        "hidden_act": config.get("hidden_activation") or "gelu_pytorch_tanh",
    }
    options = usual_options(config, ("rms_norm_eps", 1e-6))
    return ModelConfig(
        **options,
        embedding_scale=math.sqrt(options["hidden_size"]),
        qkv_bias=flag(config, "attention_bias", False),
        o_bias=flag(config, "attention_bias", False),
    )
