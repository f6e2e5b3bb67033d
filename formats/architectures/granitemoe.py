"""Granite 3 MoE (IBM 2024): all of a layer's experts in two tensors; scaled sums and logits."""

from dataclasses import replace

import numpy as np

from ..config import number
from . import hugging_face, llama
from .hugging_face import mixture

MODEL_TYPES = ("granitemoe",)
MOE = "model.layers.{}.block_sparse_moe"
NAMES = {**hugging_face.NAMES, "layers.{}.router.weight": f"{MOE}.router.layer.weight"}
FFN = {
    "gate": f"{MOE}.input_linear.weight",
    "up": f"{MOE}.input_linear.weight",
    "down": f"{MOE}.output_linear.weight",
}
ROWS = {  # of each expert's matrix
    "gate": lambda config: np.arange(config.unit_neurons),
    "up": lambda config: np.arange(config.unit_neurons, 2 * config.unit_neurons),
}


def model_config(config):
    """The ModelConfig of a GraniteMoeConfig (a dict). Raises FormatError."""
    return replace(
        llama.model_config(config),
        **mixture(config, "intermediate_size"),
        embedding_scale=number(config, "embedding_multiplier", 1.0),
        attention_scale=number(config, "attention_multiplier", 1.0),
        residual_scale=number(config, "residual_multiplier", 1.0),
        logit_scale=1 / number(config, "logits_scaling", 1.0),
    )
