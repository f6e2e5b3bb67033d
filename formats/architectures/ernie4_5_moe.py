"""ERNIE 4.5's mixtures (Baidu 2025), such as ERNIE-4.5-21B-A3B: shared experts, layers without."""

from ..config import ByLayer, ModelConfig, model_of
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag
from ..numbers import is_whole
from . import ernie4_5, hugging_face, mixtures
from .hugging_face import PAIRED_ROWS, usual_options
from .mixtures import MLP, dense_layers, mixture

MODEL_TYPES = ("ernie4_5_moe",)
CHOICE_BIAS = "layers.{}.router.choice_bias"
NAMES = {
    **hugging_face.NAMES,
    **mixtures.NAMES,
    CHOICE_BIAS: f"{MLP}.moe_statics.e_score_correction_bias"
    f"|{MLP}.gate.moe_statics.e_score_correction_bias",
}
FFN, FUSED_FFN = mixtures.EXPERTS, mixtures.FUSED_EXPERTS
DENSE_FFN = hugging_face.FFN
ROWS, FUSED_ROWS = PAIRED_ROWS, mixtures.FUSED_ROWS
ONE_ROW = (CHOICE_BIAS,)
FURTHER_NAMES = ("model.mtp_",)
LEAST_SUM = 1e-12  # of the weights of those chosen, by which these are divided
DEFAULTS = {
    **hugging_face.without(ernie4_5.DEFAULTS, "head_dim"),
    "head_dim": None,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_norm_min": LEAST_SUM,
}
ALIASES = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of an Ernie4_5_MoeConfig (a dict). Raises FormatError."""
    if flag(config, "use_bias"):
        raise FormatError("config: use_bias true of a mixture is not supported")
    if config["moe_norm_min"] != LEAST_SUM:
        raise FormatError(
            f"config: moe_norm_min {shown(config['moe_norm_min'])} is not supported, "
            f"only {LEAST_SUM}"
        )
    options = usual_options(config, d_ffn="moe_intermediate_size")
    names = {"num_experts": config["moe_num_experts"], "num_experts_per_tok": config["moe_k"]}
    return model_of(
        **options,
        **mixture(names, normalised=True, choice_bias=True),
        shared_d_ffn=_whole(config, "moe_num_shared_experts", 0) * options["d_ffn"],
        by_layer=_without_experts(config, options["num_hidden_layers"]),
    )


def _without_experts(config: Fields, layers: int) -> ByLayer:
    """By layer: an FFN without experts before ``moe_layer_start_index``, behind
    ``moe_layer_end_index``, and between every ``moe_layer_interval`` layers."""
    first, last = (_whole(config, f"moe_layer_{end}_index") for end in ("start", "end"))
    last = layers - 1 if last == -1 else last
    step = dimension(config, "moe_layer_interval")
    return dense_layers(
        config, [not first <= n <= last or (n + 1) % step != 0 for n in range(layers)]
    )


def _whole(config: Fields, key: str, least: float = float("-inf")) -> int:
    """The whole number ``config[key]``. Raises FormatError where it is not one."""
    if not is_whole(config[key], least):
        raise FormatError(f"config: {key} is {shown(config[key])}, not a whole number")
    return config[key]
