"""ERNIE 4.5's dense models (Baidu 2025): Llama whose rotary pairs are neighbours."""

from ..config import ModelConfig, Options, model_of
from ..fields import Fields, flag
from . import hugging_face
from .hugging_face import FFN, NAMES, PAIRED_ROWS, usual_options

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "ROWS", "model_config"]
MODEL_TYPES = ("ernie4_5",)
ROWS = PAIRED_ROWS
DEFAULTS = {
    **hugging_face.LLAMA,
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "use_bias": False,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of an Ernie4_5Config (a dict). Raises FormatError."""
    return model_of(**usual_options(config), **biases(config))


def biases(config: Fields) -> Options:
    """``model_of``'s options where ``use_bias`` stands for all projections."""
    bias = flag(config, "use_bias")
    return {"qkv_bias": bias, "o_bias": bias, "ffn_bias": bias}
