"""Phi-3 and Phi-3.5 mini, Phi-4 mini (Abdin et al. 2024): Llama with packed projections."""

import numpy as np

from ..config import ModelConfig, model_of
from ..errors import FormatError, shown
from ..fields import Fields
from . import hugging_face
from .hugging_face import behind, usual_options
from .rope import rope_parameters
from .windows import one_window

MODEL_TYPES = ("phi3",)
NAMES = {
    **hugging_face.NAMES,
    **{f"layers.{{}}.{p}_proj.weight": "model.layers.{}.self_attn.qkv_proj.weight" for p in "qkv"},
}
GATE_UP = "model.layers.{}.mlp.gate_up_proj.weight"
FFN = {"gate": GATE_UP, "up": GATE_UP, "down": "model.layers.{}.mlp.down_proj.weight"}
ROWS = {
    **{f"{p}_proj": behind(p) for p in "qkv"},
    "gate": lambda layer: np.arange(layer.ffn.d_ffn),
    "up": lambda layer: np.arange(layer.ffn.d_ffn, 2 * layer.ffn.d_ffn),
}
DEFAULTS = {
    **hugging_face.LLAMA,
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 32000,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
}
# What its configs call rotary positions, and what they are.
ROPE_TYPES = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Phi3Config (a dict). Raises FormatError."""
    found = rope_parameters(config)
    kind = found.get("rope_type", found.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise FormatError(
            f"config: rope_type {shown(kind)} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    found = {**found, "rope_type": ROPE_TYPES[kind]}
    config = {**config, "rope_scaling": None, "rope_parameters": found}
    options = usual_options(config, partly=True)
    windows = one_window(config, options["num_hidden_layers"])
    return model_of(**options, by_layer=windows)
