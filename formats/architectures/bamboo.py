"""Bamboo and TurboSparse (Song et al. 2024): Mistral whose gate and up both pass a ReLU (dReLU)."""

from ..config import ModelConfig, model_of
from ..fields import Fields
from . import mistral
from .hugging_face import without
from .mistral import FFN, NAMES, mistral_options

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("bamboo", "turbosparsemistral")
# The activation comes with the checkpoint, as its code does.
DEFAULTS = {**without(mistral.DEFAULTS, "layer_types"), "hidden_act": None}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a BambooConfig (a dict). Raises FormatError."""
    return model_of(**mistral_options({**config, "layer_types": None}), up_relu=True)
