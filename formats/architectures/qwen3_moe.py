"""Qwen3-MoE (Yang et al. 2025), such as Qwen3-30B-A3B: Qwen3 with experts."""

from ..config import ModelConfig, model_of
from ..fields import Fields, flag
from . import hugging_face, mixtures, qwen2
from .mixtures import FUSED_ROWS, beside, mixture, some_dense
from .qwen3 import qwen3_options
from .windows import one_window

MODEL_TYPES = ("qwen3_moe",)
NAMES = {**hugging_face.NAMES, "layers.{}.router.weight": "model.layers.{}.mlp.gate.weight"}
FFN, FUSED_FFN = mixtures.EXPERTS, mixtures.FUSED_EXPERTS
DENSE_FFN = hugging_face.FFN
TURNED_BY_SHAPE = ("gate", "up", "down")  # as the first checkpoints of Qwen3-VL's mixtures
DEFAULTS = {
    **hugging_face.without(qwen2.DEFAULTS, "layer_types", "max_window_layers"),
    "hidden_size": 2048,
    "intermediate_size": 6144,
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
    "ALIASES", "DEFAULTS", "DENSE_FFN", "FFN", "FUSED_FFN", "FUSED_ROWS", "MODEL_TYPES", "NAMES",
    "TURNED_BY_SHAPE", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Qwen3MoeConfig (a dict). Raises FormatError."""
    options = qwen3_options(config, d_ffn="moe_intermediate_size")
    layers = options["num_hidden_layers"]
    windows = one_window(config, layers) if flag(config, "use_sliding_window") else ()
    return model_of(
        **options,
        **mixture(config, flag(config, "norm_topk_prob")),
        by_layer=beside(windows, some_dense(config, layers)),
    )
