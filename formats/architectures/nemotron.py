"""Nemotron and Minitron (Parmar et al. 2024): squared ReLU, no gate, partly rotary."""

from ..config import ModelConfig, flag
from .hugging_face import NAMES as LLAMA
from .hugging_face import usual_options

MODEL_TYPES = ("nemotron",)
NORM_LESS_ONE = True
NAMES = {
    **LLAMA,
    "final_norm.bias": "model.norm.bias",
    "layers.{}.attention_norm.bias": "model.layers.{}.input_layernorm.bias",
    "layers.{}.ffn_norm.bias": "model.layers.{}.post_attention_layernorm.bias",
}
FFN = {p: f"model.layers.{{}}.mlp.{p}_proj.weight" for p in ("up", "down")}


def model_config(config):
    """The ModelConfig of a NemotronConfig (a dict). Raises FormatError."""
    return ModelConfig(
        **usual_options(config, ("norm_eps", 1e-5), share=0.5),
        norm="layer",
        gated=False,
        qkv_bias=flag(config, "attention_bias", False),
        o_bias=flag(config, "attention_bias", False),
        ffn_bias=flag(config, "mlp_bias", False),
    )
