"""Arcee (AFM 2025): Llama with a squared ReLU and no gate."""

from ..config import ModelConfig, model_of
from ..fields import Fields, flag
from . import hugging_face
from .hugging_face import NAMES, attention_biases, usual_options

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("arcee",)
FFN = {p: hugging_face.FFN[p] for p in ("up", "down")}
DEFAULTS = {
    **hugging_face.LLAMA,
    "hidden_size": 2560,
    "intermediate_size": 18432,
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "attention_bias": False,
    "mlp_bias": False,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of an ArceeConfig (a dict). Raises FormatError."""
    return model_of(
        **usual_options(config),
        gated=False,
        **attention_biases(config),
        ffn_bias=flag(config, "mlp_bias"),
    )
