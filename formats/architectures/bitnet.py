"""BitNet b1.58 (Ma et al. 2025): squared ReLU with a gate, and norms within both blocks, before the
last projection of each. Its weights are taken as they are: not packed, nor to be rounded."""

from ..config import ModelConfig, model_of
from ..fields import Fields
from ..layers.norm import NormConfig
from . import hugging_face
from .hugging_face import FFN, attention_biases, usual_options

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("bitnet",)
NAMES = {
    **hugging_face.NAMES,
    "layers.{}.heads_norm.weight": "model.layers.{}.self_attn.attn_sub_norm.weight",
    "layers.{}.activations_norm.weight": "model.layers.{}.mlp.ffn_sub_norm.weight",
}
DEFAULTS = {
    **hugging_face.LLAMA,
    "vocab_size": 128256,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 30,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "attention_bias": False,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a BitNetConfig (a dict). Raises FormatError."""
    options = usual_options(config)
    return model_of(
        **options,
        **attention_biases(config),
        heads_norm=True,
        activations_norm=NormConfig("rms", options["norm_epsilon"]),
    )
