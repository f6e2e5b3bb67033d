"""Gemma 2 and 3 (2024, 2025), their texts: norms around each block, layers that see little
between those that see all, scores and logits bent below a cap."""

import math

from ..config import ModelConfig, dimension, flag, number
from ..errors import FormatError
from .hugging_face import FFN, rotary, usual_options
from .hugging_face import NAMES as LLAMA

__all__ = ["FFN", "MODEL_TYPES", "NAMES", "NORM_LESS_ONE", "model_config"]
MODEL_TYPES = ("gemma2", "gemma3_text")
NORM_LESS_ONE = True
LAYER = "model.layers.{}"
NAMES = {
    **LLAMA,
    "layers.{}.attention_after_norm.weight": f"{LAYER}.post_attention_layernorm.weight",
    "layers.{}.ffn_norm.weight": f"{LAYER}.pre_feedforward_layernorm.weight",
    "layers.{}.ffn_after_norm.weight": f"{LAYER}.post_feedforward_layernorm.weight",
}
# How often a layer sees all, where ``layer_types`` does not say it.
PATTERN = {"gemma2": 2, "gemma3_text": 6}


def model_config(config):
    """The ModelConfig of a Gemma2Config or Gemma3TextConfig (a dict). Raises FormatError."""
    config = {
        "tie_word_embeddings": True,
        **config,
        "hidden_act": config.get("hidden_activation") or "gelu_pytorch_tanh",
    }
    far, near = _rotary_configs(config)
    options = usual_options({**config, **far}, ("rms_norm_eps", 1e-6))
    layers, head_dim = options["num_hidden_layers"], options["head_dim"]
    window = dimension(config, "sliding_window", 4096)
    caps = [
        number(config, key) if config.get(key) is not None else 0.0
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
    ]
    return ModelConfig(
        **options,
        rotary_near=rotary({**config, **near}, head_dim) if near else None,
        embedding_scale=math.sqrt(options["hidden_size"]),
        attention_scale=number(config, "query_pre_attn_scalar", head_dim) ** -0.5,
        score_cap=caps[0],
        logit_cap=caps[1],
        norm_after=True,
        qk_norm=config["model_type"] == "gemma3_text",
        qkv_bias=flag(config, "attention_bias", False),
        o_bias=flag(config, "attention_bias", False),
        sliding_windows=tuple(window if kind else 0 for kind in _slides(config, layers)),
    )


def _rotary_configs(config):
    """What the rotary positions of layers that see all, and of the others, differ in."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "full_attention" in parameters:
        far, near = parameters["full_attention"], parameters.get("sliding_attention", {})
        return {"rope_parameters": far}, {"rope_parameters": near}
    if config["model_type"] == "gemma2":
        return {}, None
    near = {"rope_theta": config.get("rope_local_base_freq", 10000.0), "rope_scaling": None}
    return {"rope_theta": config.get("rope_theta", 1000000.0)}, near


def _slides(config, layers):
    """Whether each layer sees its window only."""
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise FormatError(f"config: layer_types is not a list of {layers}")
        return [kind == "sliding_attention" for kind in kinds]
    every = dimension(config, "sliding_window_pattern", PATTERN[config["model_type"]])
    return [(layer + 1) % every != 0 for layer in range(layers)]
