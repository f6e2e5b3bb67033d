"""Persimmon (Adept 2023): squared ReLU, normalised queries and keys, half rotary."""

from ..config import ModelConfig, flag
from .hugging_face import interleaved, usual_options

MODEL_TYPES = ("persimmon",)
KINDS = ("weight", "bias")
LAYER, ATTENTION = "model.layers.{}", "model.layers.{}.self_attn"
NAMES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    **{f"final_norm.{k}": f"model.final_layernorm.{k}" for k in KINDS},
    **{f"layers.{{}}.attention_norm.{k}": f"{LAYER}.input_layernorm.{k}" for k in KINDS},
    **{f"layers.{{}}.ffn_norm.{k}": f"{LAYER}.post_attention_layernorm.{k}" for k in KINDS},
    **{
        f"layers.{{}}.{p}_proj.{k}": f"{ATTENTION}.query_key_value.{k}"
        for p in "qkv"
        for k in KINDS
    },
    **{f"layers.{{}}.o_proj.{k}": f"{ATTENTION}.dense.{k}" for k in KINDS},
    **{f"layers.{{}}.{p}_norm.{k}": f"{ATTENTION}.{p}_layernorm.{k}" for p in "qk" for k in KINDS},
    "layers.{}.ffn.up_bias": f"{LAYER}.mlp.dense_h_to_4h.bias",
    "layers.{}.ffn.down_bias": f"{LAYER}.mlp.dense_4h_to_h.bias",
}
FFN = {
    "up": f"{LAYER}.mlp.dense_h_to_4h.weight",
    "down": f"{LAYER}.mlp.dense_4h_to_h.weight",
}
ROWS = {f"{p}_proj": interleaved(p) for p in "qkv"}


def model_config(config):
    """The ModelConfig of a PersimmonConfig (a dict). Raises FormatError."""
    config = {**config, "num_key_value_heads": None}  # it has no shared ones
    return ModelConfig(
        **usual_options(config, ("layer_norm_eps", 1e-5), share=0.5),
        norm="layer",
        qk_norm=flag(config, "qk_layernorm", True),
        gated=False,
        qkv_bias=True,
        o_bias=True,
        ffn_bias=True,
    )
