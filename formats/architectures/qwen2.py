"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on queries, keys and values."""

from ..config import ModelConfig, number
from .hugging_face import FFN, NAMES, activation, dimensions, rotary, sliding_windows

__all__ = ["FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("qwen2",)


def model_config(config):
    """The ModelConfig of a Qwen2Config (a dict). Raises FormatError."""
    common = dimensions(config)
    return ModelConfig(
        **common,
        **activation(config),
        rotary=rotary(config, common["head_dim"]),
        norm_epsilon=number(config, "rms_norm_eps", 1e-6),
        qkv_bias=True,
        sliding_windows=sliding_windows(config, common["num_hidden_layers"]),
    )
