"""DeepSeek V3 (DeepSeek-AI 2024): latent attention, and experts by sigmoid behind first layers."""

from ..config import ModelConfig, model_of
from ..fields import Fields, flag
from . import hugging_face, latent_attention, mixtures
from .latent_attention import NAMES, ROWS, TURNED_HEADS, latent_options, refuse_others
from .mixtures import FUSED_ROWS, first_dense, sigmoid_mixture

MODEL_TYPES = ("deepseek_v3",)
FFN, FUSED_FFN = mixtures.EXPERTS, mixtures.FUSED_EXPERTS
DENSE_FFN = hugging_face.FFN
FURTHER_LAYERS = "num_nextn_predict_layers"
SIGMOID = {
    **latent_attention.DEFAULTS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_interleave": True,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
DEFAULTS = {
    **SIGMOID,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "max_position_embeddings": 4096,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
}
ALIASES = {"num_local_experts": "n_routed_experts"}
__all__ = [
    "ALIASES", "DEFAULTS", "DENSE_FFN", "FFN", "FURTHER_LAYERS", "FUSED_FFN", "FUSED_ROWS",
    "MODEL_TYPES", "NAMES", "ROWS", "TURNED_HEADS", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a DeepseekV3Config (a dict). Raises FormatError."""
    refuse_others(config, moe_layer_freq=1, topk_method="noaux_tc", scoring_func="sigmoid")
    options = latent_options(config, flag(config, "rope_interleave"))
    return model_of(
        **options,
        **sigmoid_mixture(config),
        by_layer=first_dense(config, options["num_hidden_layers"]),
    )
