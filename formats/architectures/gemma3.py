"""Gemma 3 (2025), its texts: Gemma 2 without a cap on scores, and with normalised queries and keys;
layers that see little have rotary positions of their own."""

from ..config import ModelConfig, model_of
from ..fields import Fields, dimension
from . import gemma2, hugging_face
from .gemma2 import FFN, NAMES, NORM_LESS_ONE, gemma2_options
from .rope import parameters_of_kinds, rotary
from .windows import layer_windows

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "NORM_LESS_ONE", "model_config"]
MODEL_TYPES = ("gemma3_text",)
DEFAULTS = {
    **hugging_face.without(gemma2.DEFAULTS, "attn_logit_softcapping"),
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "use_bidirectional_attention": False,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Gemma3TextConfig (a dict). Raises FormatError."""
    far, near = parameters_of_kinds(config, config["rope_theta"], config["rope_local_base_freq"])
    options = gemma2_options({
        **config, "rope_parameters": far, "rope_scaling": None,
        "original_max_position_embeddings": None,
    })  # fmt: skip
    every = dimension(config, "sliding_window_pattern")
    turned = {"rotary": rotary(config, near, options["head_dim"])}
    windows = layer_windows(
        config, options["num_hidden_layers"], lambda layer: (layer + 1) % every != 0
    )
    return model_of(
        **options,
        qk_norm="head",
        by_layer=[{**window, **turned} if window else {} for window in windows],
    )
