"""OLMo 3 (OLMo team 2025): OLMo 2, of whose layers three of four see a window only, with rotary
positions of their own."""

from ..config import ModelConfig, model_of
from ..fields import Fields
from . import olmo2
from .olmo2 import FFN, NAMES, olmo2_options
from .rope import parameters_of_kinds, rotary
from .windows import layer_windows

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("olmo3",)
THETA = 500000.0  # of layers with a window, whatever ``rope_theta`` says
DEFAULTS = {**olmo2.DEFAULTS, "rope_theta": THETA, "sliding_window": 4096, "layer_types": None}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of an Olmo3Config (a dict). Raises FormatError."""
    far, near = parameters_of_kinds(config, config["rope_theta"], THETA)
    options = olmo2_options({
        **config, "rope_parameters": far, "rope_scaling": None,
        "original_max_position_embeddings": None,
    })  # fmt: skip
    turned = {"rotary": rotary(config, near, options["head_dim"])}
    windows = layer_windows(
        config, options["num_hidden_layers"], lambda layer: (layer + 1) % 4 != 0
    )
    by_layer = [{**window, **turned} if window else {} for window in windows]
    return model_of(**options, by_layer=by_layer)
