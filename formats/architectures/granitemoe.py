"""Granite 3 MoE (IBM 2024): all of a layer's experts in two tensors; scaled sums and logits."""

from ..config import ModelConfig, model_of
from ..fields import Fields
from . import granite, hugging_face, mixtures
from .granite import multipliers
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
    **granite.MULTIPLIERS,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a GraniteMoeConfig (a dict). Raises FormatError."""
    return model_of(
        **usual_options(config),
        **attention_biases(config),
        **multipliers(config),
        **mixture(config, normalised=True),
    )
