"""Granite 4 (IBM 2025): Mamba-2 and attention, with experts or without, all with a shared one."""

import numpy as np

from ..config import MOST_EXPERTS, ByLayer, ModelConfig, Options, model_of
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag, of_layers
from ..layers.mamba2 import Mamba2Config
from ..layers.norm import NormConfig
from ..numbers import is_whole
from . import granite, granitemoe, hugging_face, mamba2, mixtures
from .granite import multipliers
from .hugging_face import attention_biases, usual_options
from .mamba2 import step_limits
from .mixtures import mixture
from .recurrent import CONVOLUTIONS, VALUES

__all__ = [
    "ALIASES", "CONVOLUTIONS", "DEFAULTS", "DENSE_FFN", "FFN", "MODEL_TYPES", "NAMES", "ROWS",
    "VALUES", "model_config",
]  # fmt: skip
MODEL_TYPES = ("granitemoehybrid",)
SHARED = "model.layers.{}.shared_mlp"
PARTS = {
    "gate": f"{SHARED}.input_linear.weight",
    "up": f"{SHARED}.input_linear.weight",
    "down": f"{SHARED}.output_linear.weight",
}
NAMES = {
    **granitemoe.NAMES,
    **mamba2.names("model.layers.{}.mamba"),
    **{f"layers.{{}}.shared.{part}.weight": name for part, name in PARTS.items()},
}
FFN, DENSE_FFN = granitemoe.FFN, PARTS
ROWS = {
    **mixtures.FUSED_ROWS,
    "shared.gate": lambda layer: np.arange(layer.ffn.shared_d_ffn),
    "shared.up": lambda layer: np.arange(layer.ffn.shared_d_ffn, 2 * layer.ffn.shared_d_ffn),
}
# Of layer_types: whether a layer has attention.
LAYER_TYPES = {
    "linear_attention": False, "mamba": False, "full_attention": True, "attention": True,
}  # fmt: skip
DEFAULTS = {
    **hugging_face.LLAMA,
    "attention_bias": False,
    **granite.MULTIPLIERS,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 1024,
    "position_embedding_type": None,
    "layer_types": None,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_limit": (0.0, float("inf")),
}
ALIASES = {"layers_block_type": "layer_types"}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a GraniteMoeHybridConfig (a dict). Raises FormatError."""
    options = usual_options(config)
    if config["position_embedding_type"] != "rope":
        options["rotary"] = None
    shared = dimension(config, "shared_intermediate_size")
    if config["num_local_experts"] in (0, None):
        experts: Options = {"d_ffn": shared}
    else:
        dimension(config, "num_local_experts", most=MOST_EXPERTS)
        experts = {**mixture(config, normalised=True), "shared_d_ffn": shared}
    return model_of(
        **{**options, **experts},
        **attention_biases(config),
        **multipliers(config),
        by_layer=mambas(config, options),
    )


def mambas(config: Fields, options: Options) -> ByLayer:
    """By layer: Mamba-2 in the place of attention where ``layer_types`` says so."""
    layers = options["num_hidden_layers"]
    kinds = config["layer_types"]
    kinds = ["linear_attention"] * layers if kinds is None else kinds
    attends = of_layers("layer_types", kinds, LAYER_TYPES, layers)
    if all(attends):
        return []
    mixer = mamba(config, options)
    return [{} if attention else {"mixer": mixer} for attention in attends]


def mamba(config: Fields, options: Options) -> Mamba2Config:
    """The Mamba-2 of a layer."""
    width = dimension(config, "mamba_expand") * options["hidden_size"]
    heads, head_dim = dimension(config, "mamba_n_heads"), config["mamba_d_head"]
    head_dim = width // heads if head_dim == "auto" else head_dim
    if not is_whole(head_dim, 1) or head_dim * heads != width:
        raise FormatError(
            f"config: {heads} heads of mamba_d_head {shown(config['mamba_d_head'])} are not the "
            f"{width} numbers of mamba_expand times hidden_size"
        )
    return Mamba2Config(
        hidden_size=options["hidden_size"],
        heads=heads,
        head_dim=head_dim,
        groups=dimension(config, "mamba_n_groups"),
        state_size=dimension(config, "mamba_d_state"),
        kernel=dimension(config, "mamba_d_conv"),
        activation=options["activation"],
        steps=step_limits(config),
        norm=NormConfig("rms", options["norm_epsilon"]),
        conv_bias=flag(config, "mamba_conv_bias"),
        proj_bias=flag(config, "mamba_proj_bias"),
    )
