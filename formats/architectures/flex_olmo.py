"""FlexOlmo (Shi et al. 2025): OLMo 2 with experts, which were trained apart."""

from ..config import ModelConfig, model_of
from ..fields import Fields, flag
from . import mixtures, olmo2
from .mixtures import FUSED_ROWS, mixture
from .olmo2 import olmo2_options

MODEL_TYPES = ("flex_olmo",)
NAMES = {**olmo2.NAMES, "layers.{}.router.weight": "model.layers.{}.mlp.gate.weight"}
FFN, FUSED_FFN = mixtures.EXPERTS, mixtures.FUSED_EXPERTS
DEFAULTS = {
    **olmo2.DEFAULTS,
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "eos_token_id": 100257,
    "num_experts": 7,
    "num_experts_per_tok": 5,
    "norm_topk_prob": False,
}
ALIASES = {"num_local_experts": "num_experts"}
__all__ = [
    "ALIASES", "DEFAULTS", "FFN", "FUSED_FFN", "FUSED_ROWS", "MODEL_TYPES", "NAMES", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a FlexOlmoConfig (a dict). Raises FormatError."""
    return model_of(**olmo2_options(config), **mixture(config, flag(config, "norm_topk_prob")))
