"""nanochat (Karpathy 2025): squared ReLU, norms without weights, one behind the embeddings, queries
and keys normalised after their rotary positions, which turn the other way round."""

import numpy as np

from ..config import ModelConfig, model_of
from ..fields import Fields
from . import hugging_face
from .gemma2 import cap
from .hugging_face import NAMES, attention_biases, by_head, usual_options

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "ROWS", "model_config"]
MODEL_TYPES = ("nanochat",)
# To turn (a, b) by a negative angle is to turn (b, a) by the positive one.
ROWS = {f"{p}_proj": by_head(p, lambda dim: np.roll(np.arange(dim), dim // 2)) for p in "qk"}
FFN = {"up": "model.layers.{}.mlp.fc1.weight", "down": "model.layers.{}.mlp.fc2.weight"}
DEFAULTS = {
    **hugging_face.LLAMA,
    "vocab_size": 50304,
    "hidden_size": 768,
    "intermediate_size": 8192,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "hidden_act": "relu2",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attention_bias": False,
    "final_logit_softcapping": 15.0,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a NanoChatConfig (a dict). Raises FormatError."""
    return model_of(
        **usual_options(config),
        **attention_biases(config),
        norm_affine=False,
        embedding_norm=True,
        qk_norm="head",
        qk_norm_after_rotary=True,
        gated=False,
        logit_cap=cap(config, "final_logit_softcapping"),
    )
