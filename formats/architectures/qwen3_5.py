"""Qwen3.5 (Qwen 2026), its texts: gated delta nets, and gated attention in every fourth layer."""

from ..config import ModelConfig, model_of
from ..fields import Fields
from . import hugging_face, qwen3_next
from .qwen3_next import CONVOLUTIONS, MIXER, VALUES, delta_nets, qwen3_next_options

MODEL_TYPES = ("qwen3_5_text",)
NORM_LESS_ONE = True
FURTHER_NAMES = ("mtp.",)
OWN = {
    f"layers.{{}}.{ours}_proj.weight": f"{MIXER}.in_proj_{theirs}.weight"
    for ours, theirs in (("in", "qkv"), ("z", "z"), ("a", "a"), ("b", "b"))
}
NAMES = {**qwen3_next.NAMES, **OWN}
ROWS = qwen3_next.OF_ATTENTION
FFN = hugging_face.FFN
DEFAULTS = {
    **qwen3_next.SHARED,
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
__all__ = [
    "CONVOLUTIONS", "DEFAULTS", "FFN", "FURTHER_NAMES", "MODEL_TYPES", "NAMES", "NORM_LESS_ONE",
    "ROWS", "VALUES", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Qwen3_5TextConfig (a dict). Raises FormatError."""
    options = qwen3_next_options(config)
    return model_of(**options, by_layer=delta_nets(config, options))
