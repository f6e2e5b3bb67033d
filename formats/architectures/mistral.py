"""Mistral (Jiang et al. 2023) with its sliding window, of all layers or of those it names."""

from ..config import ModelConfig, Options, model_of
from ..fields import Fields
from . import hugging_face
from .hugging_face import FFN, NAMES, usual_options
from .windows import layer_windows

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("mistral", "ministral")
DEFAULTS = {
    **hugging_face.LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "layer_types": None,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a MistralConfig (a dict). Raises FormatError."""
    return model_of(**mistral_options(config))


def mistral_options(config: Fields) -> Options:
    """Options of ``model_of``, which Mixtral has, too."""
    options, windowed = usual_options(config), config["sliding_window"] is not None
    windows = layer_windows(config, options["num_hidden_layers"], lambda layer: windowed)
    return {**options, "by_layer": windows}
