"""Qwen3 (Yang et al. 2025): Llama with normalised queries and keys."""

from ..config import ModelConfig, flag, number
from .hugging_face import FFN, NAMES, activation, dimensions, rotary, sliding_windows

__all__ = ["FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("qwen3",)


def model_config(config):
    """The ModelConfig of a Qwen3Config (a dict). Raises FormatError."""
    common = dimensions(config)
    return ModelConfig(
        **common,
        **activation(config),
        rotary=rotary(config, common["head_dim"]),
        norm_epsilon=number(config, "rms_norm_eps", 1e-6),
        qk_norm=True,
        qkv_bias=flag(config, "attention_bias", False),
        o_bias=flag(config, "attention_bias", False),
        sliding_windows=sliding_windows(config, common["num_hidden_layers"]),
    )
