"""OLMoE (Muennighoff et al. 2024): 64 small experts, 8 of them for each token."""

from ..config import ModelConfig, model_of
from ..errors import FormatError
from ..fields import Fields, flag
from . import hugging_face, mixtures
from .hugging_face import attention_biases, usual_options
from .mixtures import FUSED_ROWS, mixture

MODEL_TYPES = ("olmoe",)
NAMES = {**hugging_face.NAMES, "layers.{}.router.weight": "model.layers.{}.mlp.gate.weight"}
FFN, FUSED_FFN = mixtures.EXPERTS, mixtures.FUSED_EXPERTS
DEFAULTS = {
    **hugging_face.LLAMA,
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 50279,
    "attention_bias": False,
    "clip_qkv": None,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}
ALIASES = {"num_local_experts": "num_experts"}
__all__ = [
    "ALIASES", "DEFAULTS", "FFN", "FUSED_FFN", "FUSED_ROWS", "MODEL_TYPES", "NAMES", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of an OlmoeConfig (a dict). Raises FormatError."""
    if config["clip_qkv"] is not None:
        raise FormatError("config: clip_qkv is not supported")
    return model_of(
        **usual_options(config),
        qk_norm="all",
        **attention_biases(config),
        **mixture(config, flag(config, "norm_topk_prob")),
    )
