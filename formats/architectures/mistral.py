"""Mistral (Jiang et al. 2023) with its sliding window."""

from ..config import ModelConfig
from . import hugging_face
from .hugging_face import FFN, NAMES, one_window, usual_options

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("mistral",)
DEFAULTS = {
    **hugging_face.LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def model_config(config):
    """The ModelConfig of a MistralConfig (a dict). Raises FormatError."""
    options = usual_options(config)
    windows = one_window(config, options["num_hidden_layers"])
    return ModelConfig(**options, sliding_windows=windows)
