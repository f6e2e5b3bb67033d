"""Gemma (2024): Llama with scaled embeddings and norms stored less one."""

import math

from ..config import ModelConfig, flag, number
from .hugging_face import FFN, NAMES, activation, dimensions, rotary

__all__ = ["FFN", "MODEL_TYPES", "NAMES", "NORM_LESS_ONE", "model_config"]
MODEL_TYPES = ("gemma",)
NORM_LESS_ONE = True


def model_config(config):
    """The ModelConfig of a GemmaConfig (a dict). Raises FormatError."""
    common = dimensions(config, tied=True)
    # Gemma was trained with the tanh form of gelu, also where its first configs say "gelu".
    act = config.get("hidden_activation") or "gelu_pytorch_tanh"
    return ModelConfig(
        **common,
        **activation({"hidden_act": act}),
        rotary=rotary(config, common["head_dim"]),
        norm_epsilon=number(config, "rms_norm_eps", 1e-6),
        embedding_scale=math.sqrt(common["hidden_size"]),
        qkv_bias=flag(config, "attention_bias", False),
        o_bias=flag(config, "attention_bias", False),
    )
