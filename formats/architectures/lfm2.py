"""LFM2 (Liquid AI 2025): short convolutions, and attention in some layers."""

from ..config import ByLayer, ModelConfig, Options, model_of
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag, number, of_layers
from ..layers.short_conv import ShortConvConfig
from ..numbers import is_whole
from . import hugging_face, recurrent
from .hugging_face import usual_options

MODEL_TYPES = ("lfm2",)
LAYER = "model.layers.{}"
NAMES = {
    **hugging_face.NAMES,
    "final_norm.weight": "model.embedding_norm.weight",
    "layers.{}.attention_norm.weight": f"{LAYER}.operator_norm.weight",
    "layers.{}.ffn_norm.weight": f"{LAYER}.ffn_norm.weight",
    "layers.{}.o_proj.weight": f"{LAYER}.self_attn.out_proj.weight",
    **{f"layers.{{}}.{p}_norm.weight": f"{LAYER}.self_attn.{p}_layernorm.weight" for p in "qk"},
    **{
        f"layers.{{}}.{p}.{kind}": f"{LAYER}.conv.{p}.{kind}"
        for p in ("in_proj", "conv", "out_proj")
        for kind in ("weight", "bias")
    },
}
FFN = {p: f"{LAYER}.feed_forward.w{n}.weight" for p, n in (("gate", 1), ("up", 3), ("down", 2))}
CONVOLUTIONS = recurrent.CONVOLUTIONS
# Of layer_types: whether a layer has attention.
LAYER_TYPES = {"full_attention": True, "conv": False}
SHARED = {
    **hugging_face.without(hugging_face.LLAMA, "rms_norm_eps", "hidden_act"),
    "vocab_size": 65536,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "conv_bias": False,
    "conv_L_cache": 3,
    "layer_types": None,
}
DEFAULTS = {
    **SHARED,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "full_attn_idxs": None,
}
ALIASES = {"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of an Lfm2Config (a dict). Raises FormatError."""
    options = lfm2_options(config)
    if flag(config, "block_auto_adjust_ff_dim"):
        options["d_ffn"] = _adjusted(config, options["d_ffn"])
    if config["layer_types"] is None:
        layers, given = options["num_hidden_layers"], config["full_attn_idxs"]
        those = list(range(layers)) if given is None else given
        if not isinstance(those, list) or not all(is_whole(n) for n in those):
            raise FormatError(f"config: full_attn_idxs is {shown(those)}, not a list of layers")
        kinds = ["full_attention" if n in those else "conv" for n in range(layers)]
        config = {**config, "layer_types": kinds}
    return model_of(**options, by_layer=convolutions(config, options))


def lfm2_options(config: Fields, d_ffn: str = "intermediate_size") -> Options:
    """The options of ``model_of`` that LFM2's layers share."""
    options = usual_options({**config, "hidden_act": "silu"}, epsilon="norm_eps", d_ffn=d_ffn)
    return {**options, "qk_norm": "head"}


def convolutions(config: Fields, options: Options) -> ByLayer:
    """By layer: a short convolution in the place of attention where ``layer_types`` says so."""
    layers = options["num_hidden_layers"]
    attends = of_layers("layer_types", config["layer_types"], LAYER_TYPES, layers)
    conv = ShortConvConfig(
        hidden_size=options["hidden_size"],
        kernel=dimension(config, "conv_L_cache"),
        conv_bias=flag(config, "conv_bias"),
    )
    return [{} if attention else {"mixer": conv} for attention in attends]


def _adjusted(config: Fields, neurons: int) -> int:
    """Two thirds of the neurons that the config states, which stand for an FFN without a gate."""
    neurons = int(2 * neurons / 3)
    if config["block_ffn_dim_multiplier"] is not None:
        multiple = dimension(config, "block_multiple_of")
        neurons = int(number(config, "block_ffn_dim_multiplier") * neurons)
        neurons = multiple * ((neurons + multiple - 1) // multiple)
    return neurons
