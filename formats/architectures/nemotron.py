"""Nemotron and Minitron (Parmar et al. 2024): squared ReLU, no gate, partly rotary."""

from ..config import ModelConfig, model_of
from ..fields import Fields, flag
from . import hugging_face
from .hugging_face import attention_biases, usual_options

MODEL_TYPES = ("nemotron",)
NORM_LESS_ONE = True
NAMES = {
    **hugging_face.NAMES,
    "final_norm.bias": "model.norm.bias",
    "layers.{}.attention_norm.bias": "model.layers.{}.input_layernorm.bias",
    "layers.{}.ffn_norm.bias": "model.layers.{}.post_attention_layernorm.bias",
}
FFN = {p: f"model.layers.{{}}.mlp.{p}_proj.weight" for p in ("up", "down")}
DEFAULTS = {
    **hugging_face.without(hugging_face.LLAMA, "rms_norm_eps"),
    "vocab_size": 256000,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_attention_heads": 48,
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a NemotronConfig (a dict). Raises FormatError."""
    return model_of(
        **usual_options(config, epsilon="norm_eps", partly=True),
        norm="layer",
        gated=False,
        **attention_biases(config),
        ffn_bias=flag(config, "mlp_bias"),
    )
