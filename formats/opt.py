"""OPT (Zhang et al. 2022), as Hugging Face saves it: options and tensor names."""

from .config import ModelConfig, dimension, flag, token_ids

MODEL_TYPE = "opt"

# Our name -> the checkpoint's, under its "model." prefix; {} is the layer.
NAMES = {
    "embed_tokens.weight": "decoder.embed_tokens.weight",
    "embed_positions.weight": "decoder.embed_positions.weight",
    "project_in.weight": "decoder.project_in.weight",
    "project_out.weight": "decoder.project_out.weight",
    "final_norm.weight": "decoder.final_layer_norm.weight",
    "final_norm.bias": "decoder.final_layer_norm.bias",
    "layers.{}.attention_norm.weight": "decoder.layers.{}.self_attn_layer_norm.weight",
    "layers.{}.attention_norm.bias": "decoder.layers.{}.self_attn_layer_norm.bias",
    "layers.{}.q_proj.weight": "decoder.layers.{}.self_attn.q_proj.weight",
    "layers.{}.q_proj.bias": "decoder.layers.{}.self_attn.q_proj.bias",
    "layers.{}.k_proj.weight": "decoder.layers.{}.self_attn.k_proj.weight",
    "layers.{}.k_proj.bias": "decoder.layers.{}.self_attn.k_proj.bias",
    "layers.{}.v_proj.weight": "decoder.layers.{}.self_attn.v_proj.weight",
    "layers.{}.v_proj.bias": "decoder.layers.{}.self_attn.v_proj.bias",
    "layers.{}.o_proj.weight": "decoder.layers.{}.self_attn.out_proj.weight",
    "layers.{}.o_proj.bias": "decoder.layers.{}.self_attn.out_proj.bias",
    "layers.{}.ffn_norm.weight": "decoder.layers.{}.final_layer_norm.weight",
    "layers.{}.ffn_norm.bias": "decoder.layers.{}.final_layer_norm.bias",
    "layers.{}.ffn.up_bias": "decoder.layers.{}.fc1.bias",
    "layers.{}.ffn.down_bias": "decoder.layers.{}.fc2.bias",
}
UP, DOWN = "decoder.layers.{}.fc1.weight", "decoder.layers.{}.fc2.weight"


def model_config(config):
    """The ModelConfig of a Hugging Face OPTConfig (a dict). Raises FormatError."""
    hidden_size = dimension(config, "hidden_size")
    norm_before = flag(config, "do_layer_norm_before", True)
    bos = token_ids(config, "bos_token_id")
    return ModelConfig(
        vocab_size=dimension(config, "vocab_size"),
        hidden_size=hidden_size,
        d_ffn=dimension(config, "ffn_dim"),
        num_hidden_layers=dimension(config, "num_hidden_layers"),
        num_attention_heads=dimension(config, "num_attention_heads"),
        max_position_embeddings=dimension(config, "max_position_embeddings"),
        embedding_size=dimension(config, "word_embed_proj_dim", hidden_size),
        position_offset=2,
        norm_before=norm_before,
        final_norm=norm_before and not flag(config, "_remove_final_layer_norm", False),
        norm_affine=flag(config, "layer_norm_elementwise_affine", True),
        bias=flag(config, "enable_bias", True),
        activation=config.get("activation_function", "relu"),
        tied=flag(config, "tie_word_embeddings", True),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=token_ids(config, "eos_token_id"),
    )
