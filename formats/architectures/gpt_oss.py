"""GPT-OSS (OpenAI 2025): experts in MXFP4, with biases and a limited gate; attention sinks."""

from dataclasses import replace

import numpy as np

from ..config import dimension, number
from . import hugging_face, llama
from .hugging_face import mixture, sliding_windows

MODEL_TYPES = ("gpt_oss",)
MLP = "model.layers.{}.mlp"
NAMES = {
    **hugging_face.NAMES,
    "layers.{}.sinks": "model.layers.{}.self_attn.sinks",
    "layers.{}.router.weight": f"{MLP}.router.weight",
    "layers.{}.router.bias": f"{MLP}.router.bias",
    "layers.{}.ffn.gate_bias": f"{MLP}.experts.gate_up_proj_bias",
    "layers.{}.ffn.up_bias": f"{MLP}.experts.gate_up_proj_bias",
    "layers.{}.ffn.down_bias": f"{MLP}.experts.down_proj_bias",
}
FFN = {
    part: f"{MLP}.experts.{name}_mxfp4|{MLP}.experts.{name}"
    for part, name in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj"))
}
ROWS = {  # gate and up lie in turn
    name: lambda config, first=first: np.arange(first, 2 * config.unit_neurons, 2)
    for first, part in enumerate(("gate", "up"))
    for name in (part, f"{part}_bias")
}
EXPERTS_TURNED = True  # those that are not in MXFP4


def model_config(config):
    """The ModelConfig of a GptOssConfig (a dict). Raises FormatError."""
    plain = llama.model_config({"attention_bias": True, **config})
    return replace(
        plain,
        **mixture(config, "intermediate_size"),
        router_bias=True,
        ffn_bias=True,
        activation="quick_gelu",
        limit=number(config, "swiglu_limit", 7.0),
        attention_sinks=True,
        sliding_windows=sliding_windows(config, dimension(config, "num_hidden_layers")),
    )
