"""What mixtures of experts share: how Hugging Face names and packs experts, and describes routers
and layers without experts."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import MOST_EXPERTS, ByLayer, Options
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag, number
from ..layers.ffn import RouterConfig
from ..numbers import is_whole

MLP = "model.layers.{}.mlp"
# Experts: one tensor each; or all of a layer's in two.
EXPERTS = {p: f"{MLP}.experts.{{expert}}.{p}_proj.weight" for p in ("gate", "up", "down")}
FUSED_EXPERTS = {
    part: f"{MLP}.experts.{name}"
    for part, name in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj"))
}
FUSED_ROWS = {  # of each expert's matrix in them
    "gate": lambda layer: np.arange(layer.ffn.d_ffn),
    "up": lambda layer: np.arange(layer.ffn.d_ffn, 2 * layer.ffn.d_ffn),
}
# What DeepSeek V3 and those that follow it have beside their experts.
NAMES = {
    "layers.{}.router.weight": f"{MLP}.gate.weight",
    "layers.{}.router.choice_bias": f"{MLP}.gate.e_score_correction_bias",
    **{
        f"layers.{{}}.shared.{p}.weight": f"{MLP}.shared_experts.{p}_proj.weight"
        for p in ("gate", "up", "down")
    },
}


def mixture(config: Fields, normalised: bool, **options: Any) -> Options:
    """The ``router`` of a mixture of experts; options: RouterConfig's others.

    normalised  whether the weights of the experts that a token uses add up to 1
    """
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = dimension(config, next(key for key in keys if key in config), most=MOST_EXPERTS)
    per_token = dimension(config, "num_experts_per_tok")
    router = RouterConfig(
        experts=experts, experts_per_token=per_token, normalised=normalised, **options
    )
    return {"router": router}


def sigmoid_router(config: Fields) -> Options:
    """``router`` as DeepSeek V3 and those that follow it have it."""
    return mixture(
        config,
        flag(config, "norm_topk_prob"),
        scoring="sigmoid",
        choice_bias=True,
        groups=dimension(config, "n_group"),
        groups_kept=dimension(config, "topk_group"),
        scale=number(config, "routed_scaling_factor"),
    )


def sigmoid_mixture(config: Fields) -> Options:
    """The same router, and ``shared_d_ffn`` by how many experts are shared."""
    shared = dimension(config, "n_shared_experts") * dimension(config, "moe_intermediate_size")
    return {**sigmoid_router(config), "shared_d_ffn": shared}


def some_dense(config: Fields, layers: int) -> ByLayer:
    """By layer: an FFN without experts where ``decoder_sparse_step`` or ``mlp_only_layers`` says
    so; empty where all have experts."""
    step, given = dimension(config, "decoder_sparse_step"), config["mlp_only_layers"]
    given = [] if given is None else given
    if not isinstance(given, list) or not all(is_whole(layer) for layer in given):
        raise FormatError(f"config: mlp_only_layers is {shown(given)}, not a list of layers")
    only = set(given)
    return dense_layers(config, [n in only or (n + 1) % step != 0 for n in range(layers)])


def first_dense(config: Fields, layers: int) -> ByLayer:
    """The same of the first ``first_k_dense_replace`` layers."""
    first = config["first_k_dense_replace"]
    if not is_whole(first, 0):
        raise FormatError(f"config: first_k_dense_replace is {shown(first)}, not a whole number")
    return dense_layers(config, [n < first for n in range(layers)])


def dense_layers(config: Fields, without_experts: Sequence[bool]) -> ByLayer:
    """By layer: an FFN of ``intermediate_size`` neurons where it is without experts."""
    if not any(without_experts):
        return []
    d_ffn = dimension(config, "intermediate_size")
    dense = {"router": None, "d_ffn": d_ffn, "shared_d_ffn": 0, "shared_gated": False}
    return [dense if without else {} for without in without_experts]


def beside(*by_layer: ByLayer) -> ByLayer:
    """What each layer has of its own, from several lists that name all layers or are empty."""
    lists = [layers for layers in by_layer if layers]
    return [dict(itertools.chain(*map(dict.items, own))) for own in zip(*lists, strict=True)]
