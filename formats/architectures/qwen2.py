"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on queries, keys and values."""

from ..config import ModelConfig, model_of
from ..fields import Fields
from . import hugging_face
from .hugging_face import FFN, NAMES, usual_options
from .windows import switched_windows

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("qwen2",)
DEFAULTS = {
    **hugging_face.LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Qwen2Config (a dict). Raises FormatError."""
    options = usual_options(config)
    windows = switched_windows(config, options["num_hidden_layers"], last_layers)
    return model_of(**options, qkv_bias=True, by_layer=windows)


def last_layers(layer: int, first: int) -> bool:
    return layer >= first
