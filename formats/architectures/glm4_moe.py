"""GLM-4.5 (Zhipu AI 2025): partly rotary attention, DeepSeek V3's experts, first layers without."""

from ..config import ModelConfig, model_of
from ..fields import Fields, flag
from . import hugging_face, mixtures
from .hugging_face import usual_options
from .mixtures import FUSED_ROWS, first_dense, sigmoid_mixture

MODEL_TYPES = ("glm4_moe",)
NAMES = {**hugging_face.NAMES, **mixtures.NAMES}
FFN, FUSED_FFN = mixtures.EXPERTS, mixtures.FUSED_EXPERTS
DENSE_FFN = hugging_face.FFN
FURTHER_LAYERS = "num_nextn_predict_layers"
DEFAULTS = {
    **hugging_face.LLAMA,
    "vocab_size": 151552,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "attention_bias": False,
    "partial_rotary_factor": 0.5,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "use_qk_norm": False,
}
ALIASES = {"num_local_experts": "n_routed_experts"}
__all__ = [
    "ALIASES", "DEFAULTS", "DENSE_FFN", "FFN", "FURTHER_LAYERS", "FUSED_FFN", "FUSED_ROWS",
    "MODEL_TYPES", "NAMES", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Glm4MoeConfig (a dict). Raises FormatError."""
    options = usual_options(config, d_ffn="moe_intermediate_size", partly=True)
    return model_of(
        **options,
        qkv_bias=flag(config, "attention_bias"),
        qk_norm="head" if flag(config, "use_qk_norm") else None,
        **sigmoid_mixture(config),
        by_layer=first_dense(config, options["num_hidden_layers"]),
    )
