"""XLM-RoBERTa (Conneau et al. 2020): RoBERTa of many languages."""

from . import roberta
from .roberta import FFN, NAMES, OPTIONAL, model_config

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "OPTIONAL", "model_config"]
MODEL_TYPES = ("xlm-roberta",)
DEFAULTS = {**roberta.DEFAULTS, "vocab_size": 30522}
