"""OPT (Zhang et al. 2022), as Hugging Face saves it: options and tensor names."""

from ..config import ModelConfig, model_of
from ..fields import Fields, dimension, flag
from .hugging_face import activation, dimensions

MODEL_TYPES = ("opt",)

NAMES = {
    "embed_tokens.weight": "model.decoder.embed_tokens.weight",
    "embed_positions.weight": "model.decoder.embed_positions.weight",
    "project_in.weight": "model.decoder.project_in.weight",
    "project_out.weight": "model.decoder.project_out.weight",
    "final_norm.weight": "model.decoder.final_layer_norm.weight",
    "final_norm.bias": "model.decoder.final_layer_norm.bias",
    "layers.{}.attention_norm.weight": "model.decoder.layers.{}.self_attn_layer_norm.weight",
    "layers.{}.attention_norm.bias": "model.decoder.layers.{}.self_attn_layer_norm.bias",
    "layers.{}.q_proj.weight": "model.decoder.layers.{}.self_attn.q_proj.weight",
    "layers.{}.q_proj.bias": "model.decoder.layers.{}.self_attn.q_proj.bias",
    "layers.{}.k_proj.weight": "model.decoder.layers.{}.self_attn.k_proj.weight",
    "layers.{}.k_proj.bias": "model.decoder.layers.{}.self_attn.k_proj.bias",
    "layers.{}.v_proj.weight": "model.decoder.layers.{}.self_attn.v_proj.weight",
    "layers.{}.v_proj.bias": "model.decoder.layers.{}.self_attn.v_proj.bias",
    "layers.{}.o_proj.weight": "model.decoder.layers.{}.self_attn.out_proj.weight",
    "layers.{}.o_proj.bias": "model.decoder.layers.{}.self_attn.out_proj.bias",
    "layers.{}.ffn_norm.weight": "model.decoder.layers.{}.final_layer_norm.weight",
    "layers.{}.ffn_norm.bias": "model.decoder.layers.{}.final_layer_norm.bias",
    "layers.{}.ffn.up_bias": "model.decoder.layers.{}.fc1.bias",
    "layers.{}.ffn.down_bias": "model.decoder.layers.{}.fc2.bias",
}
FFN = {"up": "model.decoder.layers.{}.fc1.weight", "down": "model.decoder.layers.{}.fc2.weight"}
DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "bos_token_id": 2,
    "eos_token_id": 2,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of an OPTConfig (a dict). Raises FormatError."""
    common = dimensions(config, d_ffn="ffn_dim")
    norm_before = flag(config, "do_layer_norm_before")
    bias = flag(config, "enable_bias")
    common["embedding_size"] = dimension(config, "word_embed_proj_dim", common["hidden_size"])
    return model_of(
        **common,
        **activation(config, "activation_function"),
        learned_positions=True,
        position_offset=2,
        norm="layer",
        norm_before=norm_before,
        norm_affine=flag(config, "layer_norm_elementwise_affine"),
        final_norm=norm_before and not flag(config, "_remove_final_layer_norm"),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        ffn_bias=bias,
    )
