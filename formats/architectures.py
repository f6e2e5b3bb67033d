"""The architectures there are: one module each, found by the config's ``model_type``."""

from . import opt
from .errors import FormatError

ARCHITECTURES = {module.MODEL_TYPE: module for module in (opt,)}


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
