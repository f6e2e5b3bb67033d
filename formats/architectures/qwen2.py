"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on queries, keys and values."""

from ..config import ModelConfig
from .hugging_face import FFN, NAMES, sliding_windows, usual_options

__all__ = ["FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("qwen2",)


def model_config(config):
    """The ModelConfig of a Qwen2Config (a dict). Raises FormatError."""
    options = usual_options(config, ("rms_norm_eps", 1e-6))
    return ModelConfig(
        **options,
        qkv_bias=True,
        sliding_windows=sliding_windows(config, options["num_hidden_layers"]),
    )
