"""Hunyuan 0.5B to 7B (Tencent 2025): Llama, queries and keys normalised after their positions."""

from dataclasses import replace

from ..config import ModelConfig, Options, model_of
from ..fields import Fields, dimension, number
from . import hugging_face
from .hugging_face import FFN, attention_biases, usual_options
from .rope import rope_parameters

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("hunyuan_v1_dense",)
NAMES = {
    **hugging_face.NAMES,
    "layers.{}.q_norm.weight": "model.layers.{}.self_attn.query_layernorm.weight",
    "layers.{}.k_norm.weight": "model.layers.{}.self_attn.key_layernorm.weight",
}
DEFAULTS = {
    **hugging_face.LLAMA,
    "vocab_size": 290943,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a HunYuanDenseV1Config (a dict). Raises FormatError."""
    return model_of(**hunyuan_options(config))


def hunyuan_options(config: Fields) -> Options:
    """``model_of``'s options that dense Hunyuans and those with experts have."""
    options, found = usual_options(config), rope_parameters(config)
    rotary = options["rotary"]
    if rotary.kind == "dynamic" and found.get("alpha"):
        # The base has grown by alpha once and for all, as if the text were that long.
        alpha = number(found, "alpha")
        options["rotary"] = replace(rotary, parameters={**rotary.parameters, "alpha": alpha})
        options["max_position_embeddings"] = dimension(config, "max_position_embeddings")
    return {**options, **attention_biases(config), "qk_norm": "head", "qk_norm_after_rotary": True}
