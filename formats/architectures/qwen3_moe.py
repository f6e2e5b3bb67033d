"""Qwen3-MoE (Yang et al. 2025), such as Qwen3-30B-A3B: Qwen3 with experts."""

from ..config import ModelConfig, flag
from . import hugging_face, qwen2
from .hugging_face import FUSED_ROWS, mixture
from .qwen3 import qwen3_options
from .windows import one_window

MODEL_TYPES = ("qwen3_moe",)
NAMES = {**hugging_face.NAMES, "layers.{}.router.weight": "model.layers.{}.mlp.gate.weight"}
FFN, FUSED_FFN = hugging_face.EXPERTS, hugging_face.FUSED_EXPERTS
DEFAULTS = {
    **hugging_face.without(qwen2.DEFAULTS, "intermediate_size", "layer_types", "max_window_layers"),
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}
ALIASES = {"num_local_experts": "num_experts"}
__all__ = [
    "ALIASES", "DEFAULTS", "FFN", "FUSED_FFN", "FUSED_ROWS", "MODEL_TYPES", "NAMES", "model_config",
]  # fmt: skip


def model_config(config):
    """The ModelConfig of a Qwen3MoeConfig (a dict). Raises FormatError."""
    options = qwen3_options(config, d_ffn="moe_intermediate_size")
    if flag(config, "use_sliding_window"):
        options["sliding_windows"] = one_window(config, options["num_hidden_layers"])
    return mixture(ModelConfig(**options), config, flag(config, "norm_topk_prob"))
