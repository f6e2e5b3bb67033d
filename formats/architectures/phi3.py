"""Phi-3 and Phi-3.5 mini, Phi-4 mini (Abdin et al. 2024): Llama with packed projections."""

import numpy as np

from ..config import ModelConfig
from .hugging_face import NAMES as LLAMA
from .hugging_face import behind, sliding_windows, usual_options

MODEL_TYPES = ("phi3",)
NAMES = {
    **LLAMA,
    **{f"layers.{{}}.{p}_proj.weight": "model.layers.{}.self_attn.qkv_proj.weight" for p in "qkv"},
}
GATE_UP = "model.layers.{}.mlp.gate_up_proj.weight"
FFN = {"gate": GATE_UP, "up": GATE_UP, "down": "model.layers.{}.mlp.down_proj.weight"}
ROWS = {
    **{f"{p}_proj": behind(p) for p in "qkv"},
    "gate": lambda config: np.arange(config.d_ffn),
    "up": lambda config: np.arange(config.d_ffn, 2 * config.d_ffn),
}


def model_config(config):
    """The ModelConfig of a Phi3Config (a dict). Raises FormatError."""
    options = usual_options(config, ("rms_norm_eps", 1e-5))
    return ModelConfig(
        **options,
        sliding_windows=sliding_windows(config, options["num_hidden_layers"]),
    )
