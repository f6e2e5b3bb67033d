"""GPT-NeoX and Pythia (Black et al. 2022; Biderman et al. 2023): attention and FFN side by side,
each with a norm of its own; a part of each head is rotary."""

from ..config import ModelConfig, model_of
from ..errors import FormatError, shown
from ..fields import Fields, flag
from . import hugging_face
from .hugging_face import attention_biases, interleaved, usual_options

MODEL_TYPES = ("gpt_neox",)
KINDS = ("weight", "bias")
LAYER, ATTENTION = "gpt_neox.layers.{}", "gpt_neox.layers.{}.attention"
NAMES = {
    "embed_tokens.weight": "gpt_neox.embed_in.weight",
    "lm_head.weight": "embed_out.weight|lm_head.weight",
    **{f"final_norm.{k}": f"gpt_neox.final_layer_norm.{k}" for k in KINDS},
    **{f"layers.{{}}.attention_norm.{k}": f"{LAYER}.input_layernorm.{k}" for k in KINDS},
    **{f"layers.{{}}.ffn_norm.{k}": f"{LAYER}.post_attention_layernorm.{k}" for k in KINDS},
    **{
        f"layers.{{}}.{p}_proj.{k}": f"{ATTENTION}.query_key_value.{k}"
        for p in "qkv"
        for k in KINDS
    },
    **{f"layers.{{}}.o_proj.{k}": f"{ATTENTION}.dense.{k}" for k in KINDS},
    "layers.{}.ffn.up_bias": f"{LAYER}.mlp.dense_h_to_4h.bias",
    "layers.{}.ffn.down_bias": f"{LAYER}.mlp.dense_4h_to_h.bias",
}
FFN = {
    "up": f"{LAYER}.mlp.dense_h_to_4h.weight",
    "down": f"{LAYER}.mlp.dense_4h_to_h.weight",
}
ROWS = {f"{p}_proj": interleaved(p) for p in "qkv"}
DEFAULTS = {
    # It has no keys and values that heads share, and names of its own for rotary positions.
    **hugging_face.without(
        hugging_face.LLAMA,
        "rms_norm_eps", "num_key_value_heads", "rope_theta", "partial_rotary_factor",
    ),
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "rotary_emb_base": 10000.0,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "attention_bias": True,
}  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a GPTNeoXConfig (a dict). Raises FormatError."""
    config = {
        **config,
        "rope_theta": config["rotary_emb_base"],
        "partial_rotary_factor": config["rotary_pct"],
    }
    options = usual_options(config, epsilon="layer_norm_eps", partly=True)
    if options["num_attention_heads"] * options["head_dim"] != options["hidden_size"]:
        raise FormatError(
            f"config: head_dim {shown(config['head_dim'])} is not supported; gpt_neox has heads "
            "of hidden_size / num_attention_heads"
        )
    return model_of(
        **options,
        **attention_biases(config),
        norm="layer",
        parallel=flag(config, "use_parallel_residual"),
        gated=False,
        ffn_bias=True,
    )
