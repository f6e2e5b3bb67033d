"""SmallThinker (IPADS and Zenergize AI 2025): experts with a ReLU, chosen before attention."""

from ..config import ByLayer, ModelConfig, model_of
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag
from . import hugging_face
from .hugging_face import usual_options
from .mixtures import mixture

MODEL_TYPES = ("smallthinker",)
MOE = "model.layers.{}.block_sparse_moe"
NAMES = {
    **hugging_face.NAMES,
    "layers.{}.router.weight": f"{MOE}.primary_router.weight",
}
FFN = {p: f"{MOE}.experts.{{expert}}.{p}.weight" for p in ("gate", "up", "down")}
DEFAULTS = {
    **hugging_face.without(hugging_face.LLAMA, "intermediate_size", "hidden_act"),
    "vocab_size": 151936,
    "hidden_size": 1536,
    "moe_ffn_hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": [151643, 151645],
    "rope_layout": None,
    "sliding_window_layout": None,
    "sliding_window_size": 4096,
    "moe_num_primary_experts": 32,
    "moe_num_active_primary_experts": 4,
    "moe_primary_router_apply_softmax": False,
    "moe_enable_secondary_experts": False,
    "use_qk_norm": False,
}
# Of the experimental forms of its config class: none was published.
UNUSUAL = ("moe_enable_secondary_experts", "use_qk_norm")


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a SmallThinkerConfig (a dict). Raises FormatError."""
    for field in UNUSUAL:
        if flag(config, field):
            raise FormatError(f"config: {field} true is not supported")
    options = usual_options({**config, "hidden_act": "relu"}, d_ffn="moe_ffn_hidden_size")
    experts = {
        "num_experts": config["moe_num_primary_experts"],
        "num_experts_per_tok": config["moe_num_active_primary_experts"],
    }
    softmax = flag(config, "moe_primary_router_apply_softmax")
    return model_of(
        **options,
        **mixture(
            experts, normalised=True, early=True, scoring="softmax" if softmax else "sigmoid"
        ),
        by_layer=_by_layer(config, options["num_hidden_layers"]),
    )


def _by_layer(config: Fields, layers: int) -> ByLayer:
    """By layer: a window where ``sliding_window_layout`` says so, and no rotary positions where
    ``rope_layout`` does."""
    turned = _layout(config, "rope_layout", layers, 1)
    slides = _layout(config, "sliding_window_layout", layers, 0)
    window = dimension(config, "sliding_window_size") if any(slides) else None
    return [
        {
            **({"attention_window": window} if slides[layer] else {}),
            **({} if turned[layer] else {"rotary": None}),
        }
        for layer in range(layers)
    ]


def _layout(config: Fields, field: str, layers: int, usual: int) -> list[int]:
    """Which layers have something, 0 or 1 each; all as ``usual`` where a config does not say."""
    given = [usual] * layers if config[field] is None else config[field]
    if not isinstance(given, list) or len(given) != layers or any(n not in (0, 1) for n in given):
        raise FormatError(f"config: {field} is {shown(given)}, not a list of {layers} times 0 or 1")
    return given
