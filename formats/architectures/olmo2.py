"""OLMo 2 (OLMo team 2024): norms behind each block only, and of queries and keys of all heads."""

from ..config import ModelConfig, Options, model_of
from ..fields import Fields
from . import hugging_face
from .hugging_face import FFN, attention_biases, usual_options

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("olmo2",)
LAYER = "model.layers.{}"
NAMES = {
    **hugging_face.without(hugging_face.NAMES, "layers.{}.ffn_norm.weight"),
    "layers.{}.attention_after_norm.weight": f"{LAYER}.post_attention_layernorm.weight",
    "layers.{}.ffn_after_norm.weight": f"{LAYER}.post_feedforward_layernorm.weight",
}
DEFAULTS = {
    **hugging_face.LLAMA,
    "vocab_size": 50304,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 50279,
    "attention_bias": False,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of an Olmo2Config (a dict). Raises FormatError."""
    return model_of(**olmo2_options(config))


def olmo2_options(config: Fields) -> Options:
    """``model_of``'s options that OLMo 2, 3 and FlexOlmo have."""
    return {
        **usual_options(config),
        **attention_biases(config),
        "qk_norm": "all",
        "norm_after": True,
        "bare_input": True,
    }
