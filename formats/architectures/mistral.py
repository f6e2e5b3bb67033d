"""Mistral (Jiang et al. 2023) with its sliding window; Bamboo and TurboSparse, whose gate and up
both pass a ReLU (dReLU, Song et al. 2024)."""

from ..config import ModelConfig
from .hugging_face import FFN, NAMES, sliding_windows, usual_options

__all__ = ["FFN", "MODEL_TYPES", "NAMES", "model_config"]
DOUBLE_RELU = ("bamboo", "turbosparsemistral")
MODEL_TYPES = ("mistral", *DOUBLE_RELU)


def model_config(config):
    """The ModelConfig of a MistralConfig (a dict). Raises FormatError."""
    options = usual_options(config, ("rms_norm_eps", 1e-6))
    return ModelConfig(
        **options,
        sliding_windows=sliding_windows(config, options["num_hidden_layers"]),
        up_relu=config["model_type"] in DOUBLE_RELU,
    )
