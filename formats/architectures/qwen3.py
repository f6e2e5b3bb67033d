"""Qwen3 (Yang et al. 2025): Llama with normalised queries and keys."""

from ..config import ModelConfig, flag
from .hugging_face import FFN, NAMES, sliding_windows, usual_options

__all__ = ["FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("qwen3",)


def model_config(config):
    """The ModelConfig of a Qwen3Config (a dict). Raises FormatError."""
    options = usual_options(config, ("rms_norm_eps", 1e-6))
    return ModelConfig(
        **options,
        qk_norm=True,
        qkv_bias=flag(config, "attention_bias", False),
        o_bias=flag(config, "attention_bias", False),
        sliding_windows=sliding_windows(config, options["num_hidden_layers"]),
    )
