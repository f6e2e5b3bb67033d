"""Qwen2-MoE (Yang et al. 2024): experts, and one more that every token uses, by its own gate."""

from ..config import ModelConfig, model_of
from ..fields import Fields, dimension, flag
from . import hugging_face, mixtures, qwen2
from .hugging_face import usual_options
from .mixtures import FUSED_ROWS, beside, mixture, some_dense
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
FFN, FUSED_FFN = mixtures.EXPERTS, mixtures.FUSED_EXPERTS
DENSE_FFN = hugging_face.FFN
DEFAULTS = {
    **qwen2.DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 5632,
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
    "DEFAULTS", "DENSE_FFN", "FFN", "FUSED_FFN", "FUSED_ROWS", "MODEL_TYPES", "NAMES",
    "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Qwen2MoeConfig (a dict). Raises FormatError."""
    options = usual_options(config, d_ffn="moe_intermediate_size")
    layers = options["num_hidden_layers"]
    windows = switched_windows(config, layers, every_other_layer)
    return model_of(
        **options,
        qkv_bias=flag(config, "qkv_bias"),
        shared_d_ffn=dimension(config, "shared_expert_intermediate_size"),
        shared_gated=True,
        **mixture(config, flag(config, "norm_topk_prob")),
        by_layer=beside(windows, some_dense(config, layers)),
    )


def every_other_layer(layer: int, first: int) -> bool:
    return layer % 2 == 0 and layer < first
