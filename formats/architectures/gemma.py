"""Gemma (2024): Llama with scaled embeddings and norms stored less one."""

import math

from ..config import ModelConfig, Options, model_of
from ..errors import FormatError
from ..fields import Fields
from . import hugging_face
from .hugging_face import FFN, NAMES, attention_biases, usual_options

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "NORM_LESS_ONE", "model_config"]
MODEL_TYPES = ("gemma",)
NORM_LESS_ONE = True
DEFAULTS = {
    **hugging_face.LLAMA,
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "attention_bias": False,
    "use_bidirectional_attention": None,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a GemmaConfig (a dict). Raises FormatError."""
    # Gemma was trained with the tanh form of gelu, also where its first configs say "gelu".
    if config["hidden_act"] == "gelu":
        config = {**config, "hidden_act": "gelu_pytorch_tanh"}
    return model_of(**gemma_options(config))


def gemma_options(config: Fields) -> Options:
    """``model_of``'s options that all Gemmas have."""
    if config["use_bidirectional_attention"]:
        raise FormatError("config: use_bidirectional_attention is not supported")
    options = usual_options(config)
    return {
        **options,
        "embedding_scale": math.sqrt(options["hidden_size"]),
        **attention_biases(config),
    }
