"""Qwen3.5's mixtures of experts (Qwen 2026), such as Qwen3.5-35B-A3B, their texts."""

from ..config import ModelConfig, model_of
from ..fields import Fields, dimension
from . import hugging_face, mixtures, qwen3_5, qwen3_next
from .mixtures import FUSED_ROWS, mixture
from .qwen3_next import CONVOLUTIONS, VALUES, delta_nets, qwen3_next_options

MODEL_TYPES = ("qwen3_5_moe_text",)
NORM_LESS_ONE = True
FURTHER_NAMES = ("mtp.",)
NAMES, ROWS = qwen3_5.NAMES, qwen3_5.ROWS
FFN, FUSED_FFN = mixtures.EXPERTS, mixtures.FUSED_EXPERTS
DEFAULTS = {
    **hugging_face.without(qwen3_next.SHARED, "intermediate_size"),
    "vocab_size": 248320,
    "num_hidden_layers": 40,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
}
__all__ = [
    "CONVOLUTIONS", "DEFAULTS", "FFN", "FURTHER_NAMES", "FUSED_FFN", "FUSED_ROWS", "MODEL_TYPES",
    "NAMES", "NORM_LESS_ONE", "ROWS", "VALUES", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Qwen3_5MoeTextConfig (a dict). Raises FormatError."""
    options = qwen3_next_options(config, d_ffn="moe_intermediate_size")
    return model_of(
        **options,
        **mixture(config, normalised=True),
        shared_d_ffn=dimension(config, "shared_expert_intermediate_size"),
        shared_gated=True,
        by_layer=delta_nets(config, options),
    )
