"""ProSparse (Song et al. 2024): Llama with a FATReLU, a ReLU whose threshold is above 0."""

from . import llama
from .llama import FFN, NAMES, model_config

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("sparsellama",)
# The activation comes with the checkpoint, as its code does.
DEFAULTS = {**llama.DEFAULTS, "hidden_act": None, "hidden_act_param": 0.01}
