"""Qwen3-Next (Qwen 2025): gated delta nets, gated attention in every fourth layer, and experts."""

import itertools

import numpy as np

from ..arrays import AnyArray
from ..config import ByLayer, ModelConfig, Options, model_of
from ..fields import Fields, dimension, flag
from ..layers.delta_net import DeltaNetConfig
from ..layers.layer import LayerConfig
from . import hugging_face, mixtures, qwen2_moe
from .hugging_face import activation, attention_biases, usual_options
from .mixtures import FUSED_ROWS, beside, mixture, some_dense
from .recurrent import CONVOLUTIONS, VALUES, attending

MODEL_TYPES = ("qwen3_next",)
NORM_LESS_ONE = True
FURTHER_NAMES = ("mtp.",)
MIXER = "model.layers.{}.linear_attn"
NAMES = {
    **qwen2_moe.NAMES,
    "layers.{}.g_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.g_proj.bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.{}.in_proj.weight": f"{MIXER}.in_proj_qkvz.weight",
    "layers.{}.z_proj.weight": f"{MIXER}.in_proj_qkvz.weight",
    "layers.{}.a_proj.weight": f"{MIXER}.in_proj_ba.weight",
    "layers.{}.b_proj.weight": f"{MIXER}.in_proj_ba.weight",
    "layers.{}.out_proj.weight": f"{MIXER}.out_proj.weight",
    "layers.{}.conv.weight": f"{MIXER}.conv1d.weight",
    "layers.{}.decay": f"{MIXER}.A_log",
    "layers.{}.dt_bias": f"{MIXER}.dt_bias",
    "layers.{}.gated.weight": f"{MIXER}.norm.weight",
}
FFN, FUSED_FFN = mixtures.EXPERTS, mixtures.FUSED_EXPERTS
DENSE_FFN = hugging_face.FFN
# Fields of the gated delta nets, and of the attention beside them.
SHARED = {
    **hugging_face.LLAMA,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "partial_rotary_factor": 0.25,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": None,
    "full_attention_interval": 4,
    "linear_value_heads_tiled": False,  # as GGUF files have them
}
DEFAULTS = {
    **SHARED,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}
__all__ = [
    "CONVOLUTIONS", "DEFAULTS", "DENSE_FFN", "FFN", "FURTHER_NAMES", "FUSED_FFN", "FUSED_ROWS",
    "MODEL_TYPES", "NAMES", "NORM_LESS_ONE", "ROWS", "VALUES", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Qwen3NextConfig (a dict). Raises FormatError."""
    options = qwen3_next_options(config, d_ffn="moe_intermediate_size")
    layers = options["num_hidden_layers"]
    return model_of(
        **options,
        **mixture(config, flag(config, "norm_topk_prob")),
        shared_d_ffn=dimension(config, "shared_expert_intermediate_size"),
        shared_gated=True,
        by_layer=beside(delta_nets(config, options), some_dense(config, layers)),
    )


def qwen3_next_options(config: Fields, d_ffn: str = "intermediate_size") -> Options:
    """The options of ``model_of`` that layers share, of those with attention."""
    return {
        **usual_options(config, d_ffn=d_ffn, partly=True),
        **attention_biases(config),
        "qk_norm": "head",
        "output_gate": True,
    }


def delta_nets(config: Fields, options: Options) -> ByLayer:
    """By layer: a gated delta net where there is no attention."""
    net = DeltaNetConfig(
        hidden_size=options["hidden_size"],
        key_heads=dimension(config, "linear_num_key_heads"),
        value_heads=dimension(config, "linear_num_value_heads"),
        key_dim=dimension(config, "linear_key_head_dim"),
        value_dim=dimension(config, "linear_value_head_dim"),
        kernel=dimension(config, "linear_conv_kernel_dim"),
        epsilon=options["norm_epsilon"],
        tiled=flag(config, "linear_value_heads_tiled"),
        **activation(config),
    )
    attends = attending(config, options["num_hidden_layers"])
    return [{} if attention else {"mixer": net} for attention in attends]


def _of_attention(part: int) -> hugging_face.Rows:
    """Rows of the packed q_proj of attention: of each head its query, and then its gate."""

    def rows(layer: LayerConfig) -> AnyArray:
        heads, size = layer.attention.num_attention_heads, layer.attention.head_dim
        return np.arange(2 * heads * size).reshape(heads, 2, size)[:, part].reshape(-1)

    return rows


def _of_net(*parts: str) -> hugging_face.Rows:
    """Rows of the packed in_proj_qkvz: of each head of keys its query and its key, and the values
    and gates of those that share it."""

    def rows(layer: LayerConfig) -> AnyArray:
        net = _net(layer)
        values = net.value_heads // net.key_heads * net.value_dim
        sizes = {"q": net.key_dim, "k": net.key_dim, "v": values, "z": values}
        ends = np.cumsum([0, *sizes.values()])
        ids = np.arange(net.key_heads * ends[-1]).reshape(net.key_heads, -1)
        found = dict(zip(sizes, itertools.pairwise(ends), strict=True))
        return np.concatenate([ids[:, slice(*found[part])].reshape(-1) for part in parts])

    return rows


def _of_scalars(part: int) -> hugging_face.Rows:
    """Rows of the packed in_proj_ba: of each head of keys b and then a of those that share it."""

    def rows(layer: LayerConfig) -> AnyArray:
        net = _net(layer)
        each = net.value_heads // net.key_heads
        return np.arange(2 * net.value_heads).reshape(-1, 2, each)[:, part].reshape(-1)

    return rows


def _net(layer: LayerConfig) -> DeltaNetConfig:
    assert isinstance(layer.mixer, DeltaNetConfig)
    return layer.mixer


OF_ATTENTION = {"q_proj": _of_attention(0), "g_proj": _of_attention(1)}
ROWS = {
    **OF_ATTENTION,
    "in_proj": _of_net("q", "k", "v"),
    "z_proj": _of_net("z"),
    "b_proj": _of_scalars(0),
    "a_proj": _of_scalars(1),
}
