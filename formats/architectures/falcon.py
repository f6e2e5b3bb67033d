"""Falcon 7B, 40B and RW (Almazrouei et al. 2023): side by side or not, rotary or alibi."""

from ..config import ModelConfig, Options, model_of
from ..errors import FormatError
from ..fields import Fields, dimension, flag, number
from .hugging_face import activation, dimensions, interleaved
from .rope import ROPE, longest, rope_parameters, rotary

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
DEFAULTS = {
    **ROPE,
    "vocab_size": 65024,
    "hidden_size": 4544,
    "n_embed": None,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_ln_in_parallel_attn": None,
    "layer_norm_epsilon": 1e-5,
    "num_kv_heads": None,
    "alibi": False,
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "max_position_embeddings": 2048,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "ffn_hidden_size": None,
    "activation": "gelu",
    "tie_word_embeddings": True,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a FalconConfig (a dict). Raises FormatError."""
    if config["n_embed"] is not None:
        config = {**config, "hidden_size": config["n_embed"]}
    four = 4 * dimension(config, "hidden_size")
    common = dimensions(
        {
            **config,
            "ffn_hidden_size": dimension(config, "ffn_hidden_size", four),
            "num_key_value_heads": _key_value_heads(config),
        },
        d_ffn="ffn_hidden_size",
    )
    turned = None
    if not flag(config, "alibi"):
        turned = rotary(config, rope_parameters(config), common["head_dim"])
        common["max_position_embeddings"] = longest(turned, common["max_position_embeddings"])
    bias = flag(config, "bias")
    return model_of(
        **common,
        **activation(config, "activation"),
        **_norms(config),
        rotary=turned,
        alibi=turned is None,
        norm="layer",
        norm_epsilon=number(config, "layer_norm_epsilon", zero=True),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        ffn_bias=bias,
    )


def _key_value_heads(config: Fields) -> int:
    heads = dimension(config, "num_attention_heads")
    if not flag(config, "new_decoder_architecture"):
        return 1 if flag(config, "multi_query") else heads
    return dimension(config, "num_kv_heads", heads)


def _norms(config: Fields) -> Options:
    """Whether attention and FFN stand side by side, and read the same norm."""
    new, parallel = flag(config, "new_decoder_architecture"), flag(config, "parallel_attn")
    norms = dimension(config, "num_ln_in_parallel_attn", 2 if new else 1)
    if (new and not parallel) or (parallel and norms != 1 and (not new or norms != 2)):
        raise FormatError(
            f"config: num_ln_in_parallel_attn {norms} with parallel_attn {parallel} and "
            f"new_decoder_architecture {new} is no model"
        )
    return {"parallel": parallel, "shared_norm": parallel and norms == 1}
