"""Falcon 7B, 40B and RW (Almazrouei et al. 2023): side by side or not, rotary or alibi."""

from ..config import ModelConfig, dimension, flag, number
from .hugging_face import activation, dimensions, interleaved, rotary

MODEL_TYPES = ("falcon",)
KINDS = ("weight", "bias")
LAYER, ATTENTION = "transformer.h.{}", "transformer.h.{}.self_attention"
NAMES = {
    "embed_tokens.weight": "transformer.word_embeddings.weight",
    **{f"final_norm.{k}": f"transformer.ln_f.{k}" for k in KINDS},
    # One norm for both, or two behind each other; where there are two side by side:
    **{f"layers.{{}}.attention_norm.{k}": f"{LAYER}.input_layernorm.{k}|{LAYER}.ln_attn.{k}"
       for k in KINDS},
    **{f"layers.{{}}.ffn_norm.{k}": f"{LAYER}.post_attention_layernorm.{k}|{LAYER}.ln_mlp.{k}"
       for k in KINDS},
    **{
        f"layers.{{}}.{p}_proj.{k}": f"{ATTENTION}.query_key_value.{k}"
        for p in "qkv"
        for k in KINDS
    },
    **{f"layers.{{}}.o_proj.{k}": f"{ATTENTION}.dense.{k}" for k in KINDS},
    "layers.{}.ffn.up_bias": f"{LAYER}.mlp.dense_h_to_4h.bias",
    "layers.{}.ffn.down_bias": f"{LAYER}.mlp.dense_4h_to_h.bias",
}  # fmt: skip
FFN = {
    "up": f"{LAYER}.mlp.dense_h_to_4h.weight",
    "down": f"{LAYER}.mlp.dense_4h_to_h.weight",
}
ROWS = {f"{p}_proj": interleaved(p) for p in "qkv"}


def model_config(config):
    """The ModelConfig of a FalconConfig (a dict). Raises FormatError."""
    heads = dimension(config, "num_attention_heads")
    new, alibi = flag(config, "new_decoder_architecture", False), flag(config, "alibi", False)
    key_values = heads
    if new:
        key_values = dimension(config, "num_kv_heads", heads)
    elif flag(config, "multi_query", True):
        key_values = 1
    parallel = new or flag(config, "parallel_attn", True)
    norms = dimension(config, "num_ln_in_parallel_attn", 2 if new else 1)
    bias = flag(config, "bias", False)
    four = 4 * dimension(config, "hidden_size")
    common = dimensions(
        {
            **config,
            "ffn_hidden_size": dimension(config, "ffn_hidden_size", four),
            "num_key_value_heads": key_values,
            "max_position_embeddings": dimension(config, "max_position_embeddings", 2048),
        },
        d_ffn="ffn_hidden_size",
        tied=True,
    )
    return ModelConfig(
        **common,
        **activation({"hidden_act": config.get("activation", "gelu")}),
        positions="alibi" if alibi else "rotary",
        rotary=None if alibi else rotary(
            {"max_position_embeddings": 2048, **config}, common["head_dim"]
        ),
        norm="layer",
        norm_epsilon=number(config, "layer_norm_epsilon", 1e-5),
        parallel=parallel,
        shared_norm=parallel and norms == 1,
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        ffn_bias=bias,
    )  # fmt: skip
