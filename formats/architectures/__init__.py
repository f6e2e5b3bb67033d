"""The architectures there are: one module each, found by the config's ``model_type``.

A module gives
    MODEL_TYPES           the names it goes by
    model_config(config)  the ModelConfig of a Hugging Face config (a dict)
    NAMES                 {our tensor: the checkpoint's}, {} is the layer
    FFN                   {"gate", "up", "down": the checkpoint's tensor}, {expert} is the expert;
                          without it, all of a layer's experts are in one tensor
and where they are needed
    ROWS                  {our projection: which rows of a packed tensor it is, of a ModelConfig}
    NORM_LESS_ONE         norms are stored with one taken away
    EXPERTS_TURNED        matrices of experts that lie in one tensor have rows and columns exchanged
"""

from ..errors import FormatError
from . import (
    falcon,
    gemma,
    gemma2,
    gpt_oss,
    granitemoe,
    llama,
    mistral,
    mixtral,
    nemotron,
    olmoe,
    opt,
    persimmon,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)

MODULES = (
    opt, llama, mistral, qwen2, qwen3, falcon, persimmon, phi, phi3, nemotron, gemma, gemma2,
    olmoe, qwen3_moe, qwen2_moe, mixtral, granitemoe, gpt_oss,
)  # fmt: skip
ARCHITECTURES = {name: module for module in MODULES for name in module.MODEL_TYPES}


def architecture(config):
    """The module for a Hugging Face config (a dict). Raises FormatError where there is none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise FormatError(
            f"config: model_type {str(model_type)[:40]!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


def model_config(config):
    """The ModelConfig of any supported Hugging Face config (a dict). Raises FormatError."""
    return architecture(config).model_config(config)
