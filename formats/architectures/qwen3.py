"""Qwen3 (Yang et al. 2025): Llama with normalised queries and keys."""

from ..config import ModelConfig
from . import qwen2
from .hugging_face import FFN, NAMES, attention_biases, usual_options
from .windows import switched_windows

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("qwen3",)
DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False}


def model_config(config):
    """The ModelConfig of a Qwen3Config (a dict). Raises FormatError."""
    options = qwen3_options(config)
    windows = switched_windows(config, options["num_hidden_layers"], qwen2.last_layers)
    return ModelConfig(**options, sliding_windows=windows)


def qwen3_options(config, d_ffn="intermediate_size"):
    """ModelConfig's options but for the windows."""
    return {
        **usual_options(config, d_ffn=d_ffn),
        "qk_norm": True,
        **attention_biases(config),
    }
