"""GPT-2 and DistilGPT2 (Radford et al. 2019): learned positions, and matrices that lie turned."""

from ..config import ModelConfig, model_of
from ..errors import FormatError
from ..fields import Fields, dimension, flag, number
from .hugging_face import activation, behind, dimensions

MODEL_TYPES = ("gpt2",)
KINDS = ("weight", "bias")
LAYER = "transformer.h.{}"
NAMES = {
    "embed_tokens.weight": "transformer.wte.weight",
    "embed_positions.weight": "transformer.wpe.weight",
    **{f"final_norm.{k}": f"transformer.ln_f.{k}" for k in KINDS},
    **{f"layers.{{}}.attention_norm.{k}": f"{LAYER}.ln_1.{k}" for k in KINDS},
    **{f"layers.{{}}.ffn_norm.{k}": f"{LAYER}.ln_2.{k}" for k in KINDS},
    **{f"layers.{{}}.{p}_proj.{k}": f"{LAYER}.attn.c_attn.{k}" for p in "qkv" for k in KINDS},
    **{f"layers.{{}}.o_proj.{k}": f"{LAYER}.attn.c_proj.{k}" for k in KINDS},
    "layers.{}.ffn.up_bias": f"{LAYER}.mlp.c_fc.bias",
    "layers.{}.ffn.down_bias": f"{LAYER}.mlp.c_proj.bias",
}
FFN = {"up": f"{LAYER}.mlp.c_fc.weight", "down": f"{LAYER}.mlp.c_proj.weight"}
ROWS = {f"{p}_proj": behind(p) for p in "qkv"}
TURNED = ("q_proj", "k_proj", "v_proj", "o_proj", "up", "down")  # Conv1D's weights are (in, out)
DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "tie_word_embeddings": True,
}
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a GPT2Config (a dict). Raises FormatError."""
    if flag(config, "add_cross_attention"):
        raise FormatError("config: add_cross_attention true is not supported")
    flag(config, "reorder_and_upcast_attn")  # the same in float32
    usual = {alias: dimension(config, field) for alias, field in ALIASES.items()}
    inner = dimension(config, "n_inner", 4 * usual["hidden_size"])
    common = dimensions({**config, **usual, "n_inner": inner}, d_ffn="n_inner")
    scale = common["head_dim"] ** -0.5 if flag(config, "scale_attn_weights") else 1.0
    by_layer = flag(config, "scale_attn_by_inverse_layer_idx")
    scales = [scale / (layer + 1 if by_layer else 1) for layer in range(usual["num_hidden_layers"])]
    return model_of(
        **common,
        **activation(config, "activation_function"),
        learned_positions=True,
        by_layer=[{"attention_scale": scale} for scale in scales],
        norm="layer",
        norm_epsilon=number(config, "layer_norm_epsilon", zero=True),
        gated=False,
        qkv_bias=True,
        o_bias=True,
        ffn_bias=True,
    )
