"""Gemma 2 (2024): norms around each block, layers that see little between those that see all,
scores and logits bent below a cap."""

from ..config import ModelConfig, Options, model_of
from ..fields import Fields, number
from . import gemma, hugging_face
from .gemma import gemma_options
from .hugging_face import FFN
from .windows import layer_windows

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "NORM_LESS_ONE", "model_config"]
MODEL_TYPES = ("gemma2",)
NORM_LESS_ONE = True
LAYER = "model.layers.{}"
NAMES = {
    **hugging_face.NAMES,
    "layers.{}.attention_after_norm.weight": f"{LAYER}.post_attention_layernorm.weight",
    "layers.{}.ffn_norm.weight": f"{LAYER}.pre_feedforward_layernorm.weight",
    "layers.{}.ffn_after_norm.weight": f"{LAYER}.post_feedforward_layernorm.weight",
}
DEFAULTS = {
    **hugging_face.without(gemma.DEFAULTS, "hidden_act"),
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Gemma2Config (a dict). Raises FormatError."""
    options = gemma2_options(config)
    windows = layer_windows(config, options["num_hidden_layers"], lambda layer: layer % 2 == 0)
    return model_of(
        **options,
        score_cap=cap(config, "attn_logit_softcapping"),
        by_layer=windows,
    )


def gemma2_options(config: Fields) -> Options:
    """``model_of``'s options that Gemma 2 and 3 have."""
    return {
        **gemma_options({**config, "hidden_act": config["hidden_activation"]}),
        "attention_scale": number(config, "query_pre_attn_scalar") ** -0.5,
        "logit_cap": cap(config, "final_logit_softcapping"),
        "norm_after": True,
    }


def cap(config: Fields, key: str) -> float | None:
    """What scores or logits are kept below; None: nothing."""
    return None if config[key] is None else number(config, key)
