"""Persimmon (Adept 2023): squared ReLU, normalised queries and keys, half rotary."""

from ..config import ModelConfig, model_of
from ..fields import Fields, flag
from . import hugging_face
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
DEFAULTS = {
    # It has no keys and values that heads share, and no other width of them.
    **hugging_face.without(hugging_face.LLAMA, "rms_norm_eps", "num_key_value_heads", "head_dim"),
    "vocab_size": 262144,
    "intermediate_size": 16384,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "hidden_act": "relu2",
    "max_position_embeddings": 16384,
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": True,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a PersimmonConfig (a dict). Raises FormatError."""
    return model_of(
        **usual_options(config, epsilon="layer_norm_eps", partly=True),
        norm="layer",
        qk_norm="head" if flag(config, "qk_layernorm") else None,
        gated=False,
        qkv_bias=True,
        o_bias=True,
        ffn_bias=True,
    )
