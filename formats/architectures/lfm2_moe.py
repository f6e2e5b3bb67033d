"""LFM2-MoE (Liquid AI 2025): LFM2 with experts behind its first layers."""

from ..config import ModelConfig, model_of
from ..fields import Fields, flag, number
from . import lfm2, mixtures
from .lfm2 import CONVOLUTIONS, convolutions, lfm2_options
from .mixtures import beside, first_dense, mixture

MODEL_TYPES = ("lfm2_moe",)
MLP = "model.layers.{}.feed_forward"
NAMES = {
    **lfm2.NAMES,
    "layers.{}.router.weight": f"{MLP}.gate.weight",
    "layers.{}.router.choice_bias": f"{MLP}.expert_bias",
}
DENSE_FFN = lfm2.FFN
FFN = {p: f"{MLP}.experts.{{expert}}.w{n}.weight" for p, n in (("gate", 1), ("up", 3), ("down", 2))}
FUSED_FFN = {
    part: f"{MLP}.experts.{name}"
    for part, name in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj"))
}
FUSED_ROWS = mixtures.FUSED_ROWS
DEFAULTS = {
    **lfm2.SHARED,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "num_dense_layers": 2,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "use_expert_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
ALIASES = {"tie_embedding": "tie_word_embeddings"}
__all__ = [
    "ALIASES", "CONVOLUTIONS", "DEFAULTS", "DENSE_FFN", "FFN", "FUSED_FFN", "FUSED_ROWS",
    "MODEL_TYPES", "NAMES", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of an Lfm2MoeConfig (a dict). Raises FormatError."""
    options = lfm2_options(config, d_ffn="moe_intermediate_size")
    router = mixture(
        config,
        flag(config, "norm_topk_prob"),
        scoring="sigmoid",
        choice_bias=flag(config, "use_expert_bias"),
        scale=number(config, "routed_scaling_factor"),
    )
    dense = {**config, "first_k_dense_replace": config["num_dense_layers"]}
    by_layer = beside(
        convolutions(config, options), first_dense(dense, options["num_hidden_layers"])
    )
    return model_of(**options, **router, by_layer=by_layer)
