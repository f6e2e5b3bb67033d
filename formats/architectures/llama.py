"""Llama 1 to 3.2 (Touvron et al. 2023), ReLULLaMA, and ProSparse with its FATReLU."""

from ..config import ModelConfig, flag
from .hugging_face import FFN, NAMES, usual_options

__all__ = ["FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("llama", "sparsellama")


def model_config(config):
    """The ModelConfig of a LlamaConfig (a dict). Raises FormatError."""
    return ModelConfig(
        **usual_options(config, ("rms_norm_eps", 1e-6)),
        qkv_bias=flag(config, "attention_bias", False),
        o_bias=flag(config, "attention_bias", False),
        ffn_bias=flag(config, "mlp_bias", False),
    )
