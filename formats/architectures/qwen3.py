"""Qwen3 (Yang et al. 2025): Llama with normalised queries and keys."""

from ..config import ModelConfig, Options, model_of
from ..fields import Fields
from . import qwen2
from .hugging_face import FFN, NAMES, attention_biases, usual_options
from .windows import switched_windows

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("qwen3",)
DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Qwen3Config (a dict). Raises FormatError."""
    options = qwen3_options(config)
    windows = switched_windows(config, options["num_hidden_layers"], qwen2.last_layers)
    return model_of(**options, by_layer=windows)


def qwen3_options(config: Fields, d_ffn: str = "intermediate_size") -> Options:
    """``model_of``'s options but for the windows."""
    return {
        **usual_options(config, d_ffn=d_ffn),
        "qk_norm": "head",
        **attention_biases(config),
    }
