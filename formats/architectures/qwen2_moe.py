"""Qwen2-MoE (Yang et al. 2024): experts, and one more that every token uses, by its own gate."""

from ..config import ModelConfig, dimension, flag
from . import hugging_face, qwen2
from .hugging_face import FUSED_ROWS, mixture, usual_options
from .windows import switched_windows

MODEL_TYPES = ("qwen2_moe",)
MLP = "model.layers.{}.mlp"
NAMES = {
    **hugging_face.NAMES,
    "layers.{}.router.weight": f"{MLP}.gate.weight",
    "layers.{}.shared.weigh.weight": f"{MLP}.shared_expert_gate.weight",
    **{
        f"layers.{{}}.shared.{p}.weight": f"{MLP}.shared_expert.{p}_proj.weight"
        for p in ("gate", "up", "down")
    },
}
FFN, FUSED_FFN = hugging_face.EXPERTS, hugging_face.FUSED_EXPERTS
DEFAULTS = {
    **hugging_face.without(qwen2.DEFAULTS, "intermediate_size"),
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
}
__all__ = [
    "DEFAULTS", "FFN", "FUSED_FFN", "FUSED_ROWS", "MODEL_TYPES", "NAMES", "model_config",
]  # fmt: skip


def model_config(config):
    """The ModelConfig of a Qwen2MoeConfig (a dict). Raises FormatError."""
    options = usual_options(config, d_ffn="moe_intermediate_size")
    plain = ModelConfig(
        **options,
        qkv_bias=flag(config, "qkv_bias"),
        sliding_windows=switched_windows(config, options["num_hidden_layers"], every_other_layer),
        shared_d_ffn=dimension(config, "shared_expert_intermediate_size"),
        shared_gated=True,
    )
    return mixture(plain, config, flag(config, "norm_topk_prob"))


def every_other_layer(layer, first):
    return layer % 2 == 0 and layer < first
