"""Qwen2-MoE (Yang et al. 2024): experts, and one more that every token uses, by its own gate."""

from dataclasses import replace

from ..config import dimension, flag
from . import hugging_face, qwen2
from .hugging_face import mixture

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
FFN = hugging_face.EXPERTS


def model_config(config):
    """The ModelConfig of a Qwen2MoeConfig (a dict). Raises FormatError."""
    return replace(
        qwen2.model_config(config),
        **mixture(config, normalised=False),
        qkv_bias=flag(config, "qkv_bias", True),
        shared_d_ffn=dimension(config, "shared_expert_intermediate_size"),
        shared_gated=True,
    )
