"""Granite 3 MoE (IBM 2024): all of a layer's experts in two tensors; scaled sums and logits."""

from ..config import ModelConfig, model_of
from ..fields import Fields, number
from . import hugging_face, mixtures
from .hugging_face import attention_biases, usual_options
from .mixtures import mixture

MODEL_TYPES = ("granitemoe",)
MOE = "model.layers.{}.block_sparse_moe"
NAMES = {
    **hugging_face.NAMES,
    "layers.{}.router.weight": f"{MOE}.router.layer.weight|{MOE}.router.weight",
}
FFN = {
    "gate": f"{MOE}.input_linear.weight|{MOE}.experts.gate_up_proj",
    "up": f"{MOE}.input_linear.weight|{MOE}.experts.gate_up_proj",
    "down": f"{MOE}.output_linear.weight|{MOE}.experts.down_proj",
}
ROWS = mixtures.FUSED_ROWS
DEFAULTS = {
    **hugging_face.LLAMA,
    "attention_bias": False,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a GraniteMoeConfig (a dict). Raises FormatError."""
    return model_of(
        **usual_options(config),
        **attention_biases(config),
        embedding_scale=number(config, "embedding_multiplier"),
        attention_scale=number(config, "attention_multiplier"),
        residual_scale=number(config, "residual_multiplier"),
        logit_scale=1 / number(config, "logits_scaling"),
        **mixture(config, normalised=True),
    )
