"""Ministral 3 and Devstral 2 (2025): Mistral, whose queries grow with their position."""

from ..config import ModelConfig, model_of
from ..fields import Fields, dimension, number
from ..layers.attention import Temperature
from . import hugging_face
from .hugging_face import FFN, NAMES, usual_options
from .rope import rope_parameters
from .windows import one_window

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("ministral3",)
DEFAULTS = {
    **hugging_face.LLAMA,
    "vocab_size": 131072,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
# What a config has that says nothing of its rotary positions.
ROPE_PARAMETERS: Fields = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Ministral3Config (a dict). Raises FormatError."""
    if config["rope_parameters"] is None:
        config = {**config, "rope_parameters": ROPE_PARAMETERS}
    options = usual_options(config)
    return model_of(
        **options,
        temperature=_temperature(config),
        by_layer=one_window(config, options["num_hidden_layers"]),
    )


def _temperature(config: Fields) -> Temperature:
    """How queries grow, which the parameters of rotary positions say."""
    found = rope_parameters(config)
    most: int | None = dimension(config, "max_position_embeddings")
    if found.get("rope_type", found.get("type")) not in ("llama3", "yarn", "longrope"):
        # Of other kinds the length that a config states beside the parameters is none of them.
        found = rope_parameters({**config, "original_max_position_embeddings": None})
        most = None
    return Temperature(
        number(found, "llama_4_scaling_beta", zero=True),
        dimension(found, "original_max_position_embeddings", most),
    )
