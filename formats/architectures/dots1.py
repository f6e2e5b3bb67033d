"""dots.llm1 (rednote-hilab 2025): Qwen3's attention, DeepSeek V3's experts, layers without."""

from ..config import ModelConfig, model_of
from ..fields import Fields
from . import hugging_face, mixtures, qwen2
from .mixtures import FUSED_ROWS, beside, first_dense, sigmoid_mixture
from .qwen3 import qwen3_options
from .windows import switched_windows

MODEL_TYPES = ("dots1",)
NAMES = {**hugging_face.NAMES, **mixtures.NAMES}
FFN, FUSED_FFN = mixtures.EXPERTS, mixtures.FUSED_EXPERTS
DENSE_FFN = hugging_face.FFN
DEFAULTS = {
    **hugging_face.without(qwen2.DEFAULTS, "use_sliding_window"),
    "vocab_size": 152064,
    "hidden_size": 4608,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 62,
    "max_position_embeddings": 2048,
    "max_window_layers": 62,
    "attention_bias": False,
    "n_shared_experts": None,
    "n_routed_experts": None,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": None,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
ALIASES = {"num_local_experts": "n_routed_experts"}
__all__ = [
    "ALIASES", "DEFAULTS", "DENSE_FFN", "FFN", "FUSED_FFN", "FUSED_ROWS", "MODEL_TYPES", "NAMES",
    "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Dots1Config (a dict). Raises FormatError."""
    options = qwen3_options(config, d_ffn="moe_intermediate_size")
    layers = options["num_hidden_layers"]
    switched = {**config, "use_sliding_window": True}
    windows = switched_windows(switched, layers, qwen2.last_layers)
    return model_of(
        **options,
        **sigmoid_mixture(config),
        by_layer=beside(windows, first_dense(config, layers)),
    )
