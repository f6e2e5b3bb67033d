"""GPT-OSS (OpenAI 2025): experts in MXFP4, with biases and a limited gate; attention sinks."""

import numpy as np

from ..config import ModelConfig, model_of
from ..errors import FormatError, shown
from ..fields import Fields, number
from . import hugging_face
from .hugging_face import attention_biases, usual_options
from .mixtures import mixture
from .windows import layer_windows

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
    name: lambda layer, first=first: np.arange(first, 2 * layer.ffn.d_ffn, 2)
    for first, part in enumerate(("gate", "up"))
    for name in (part, f"{part}_bias")
}
TURNED = ("gate", "up", "down")
ALPHA = 1.702  # gate x sigmoid(ALPHA gate x), which is what quick_gelu is


DEFAULTS = {
    **hugging_face.without(hugging_face.LLAMA, "hidden_act"),  # its activation is its own
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "attention_bias": True,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "layer_types": None,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": ALPHA,
    "swiglu_limit": 7.0,
}
ALIASES = {"num_experts": "num_local_experts"}
# Where rope_parameters is absent, or null.
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a GptOssConfig (a dict). Raises FormatError."""
    if config["swiglu_alpha"] != ALPHA:
        raise FormatError(
            f"config: swiglu_alpha {shown(config['swiglu_alpha'])} is not supported, {ALPHA} is"
        )
    if config["rope_parameters"] is None:
        config = {**config, "rope_parameters": YARN}
    options = usual_options({**config, "hidden_act": "quick_gelu"})
    windows = layer_windows(config, options["num_hidden_layers"], lambda layer: layer % 2 == 0)
    return model_of(
        **options,
        **attention_biases(config),
        ffn_bias=True,
        limit=number(config, "swiglu_limit"),
        attention_sinks=True,
        by_layer=windows,
        **mixture(config, normalised=True, router_bias=True),
    )
