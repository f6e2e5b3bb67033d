"""Phi-1, Phi-1.5 and Phi-2 (Li et al. 2023): attention and FFN read one norm, side by side."""

from ..config import ModelConfig, model_of
from ..fields import Fields, flag
from . import hugging_face
from .hugging_face import usual_options

MODEL_TYPES = ("phi",)
KINDS = ("weight", "bias")
NAMES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    **{f"final_norm.{k}": f"model.final_layernorm.{k}" for k in KINDS},
    **{f"layers.{{}}.attention_norm.{k}": f"model.layers.{{}}.input_layernorm.{k}" for k in KINDS},
    **{
        f"layers.{{}}.{p}_proj.{k}": f"model.layers.{{}}.self_attn.{name}.{k}"
        for p, name in zip("qkvo", ("q_proj", "k_proj", "v_proj", "dense"), strict=True)
        for k in KINDS
    },
    **{
        f"layers.{{}}.{p}_norm.{k}": f"model.layers.{{}}.self_attn.{p}_layernorm.{k}"
        for p in "qk"
        for k in KINDS
    },
    "layers.{}.ffn.up_bias": "model.layers.{}.mlp.fc1.bias",
    "layers.{}.ffn.down_bias": "model.layers.{}.mlp.fc2.bias",
}
FFN = {"up": "model.layers.{}.mlp.fc1.weight", "down": "model.layers.{}.mlp.fc2.weight"}
DEFAULTS = {
    **hugging_face.without(hugging_face.LLAMA, "rms_norm_eps"),
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a PhiConfig (a dict). Raises FormatError."""
    return model_of(
        **usual_options(config, epsilon="layer_norm_eps", partly=True),
        norm="layer",
        parallel=True,
        shared_norm=True,
        qk_norm="head" if flag(config, "qk_layernorm") else None,
        gated=False,
        qkv_bias=True,
        o_bias=True,
        ffn_bias=True,
        head_bias=True,
    )
