"""Gemma 3 (2025), its texts: Gemma 2 without a cap on scores, and with normalised queries and keys;
layers that see little have rotary positions of their own."""

from ..config import ModelConfig, model_of
from ..fields import Fields, dimension
from . import gemma2, hugging_face
from .gemma2 import FFN, NAMES, NORM_LESS_ONE, gemma2_options
from .rope import check_object, rotary
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
    far, near = _rope_parameters(config)
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


def _rope_parameters(config: Fields) -> list[Fields]:
    """The parameters of rotary positions of layers that see all, and of the others.

    Each kind of layer has its own in ``rope_parameters``; the older ``rope_scaling`` changes those
    of layers that see all, and says its kind as ``rope_type`` only.
    """
    for key in ("rope_parameters", "rope_scaling"):
        check_object(config[key], key)
    given, found = config["rope_parameters"] or {}, []
    bases = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    for kind, base in bases.items():
        check_object(given.get(kind), kind)
        own = given.get(kind) or {"rope_type": "default"}
        if kind == "full_attention":
            own = {**own, **(config["rope_scaling"] or {})}
        beside = {
            "rope_theta": config[base],
            "partial_rotary_factor": config["partial_rotary_factor"],
        }
        # transformers reads ``truncate`` from ``rope_parameters`` itself, not from the entry of a
        # layer type.
        found.append({**beside, **own, "truncate": given.get("truncate", True)})
    return found
