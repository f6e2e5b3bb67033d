"""What DeepSeek V2 and those that follow it share: latent attention, as Hugging Face's configs and
checkpoints have it."""

from collections.abc import Callable

import numpy as np

from ..arrays import AnyArray
from ..config import Options
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag, number
from ..layers.latent_attention import LatentAttentionConfig
from ..layers.layer import LayerConfig
from ..layers.norm import NormConfig
from . import hugging_face, mixtures
from .hugging_face import Rows, usual_options
from .rope import rope_parameters

ATTENTION = "model.layers.{}.self_attn"
KINDS = ("weight", "bias")
NAMES = {
    **hugging_face.NAMES,
    **mixtures.NAMES,
    **{f"layers.{{}}.q_a_proj.{k}": f"{ATTENTION}.q_a_proj.{k}" for k in KINDS},
    "layers.{}.q_b_proj.weight": f"{ATTENTION}.q_b_proj.weight",
    **{f"layers.{{}}.kv_a_proj.{k}": f"{ATTENTION}.kv_a_proj_with_mqa.{k}" for k in KINDS},
    **{
        f"layers.{{}}.{p}_a_norm.weight": f"{ATTENTION}.{p}_a_layernorm.weight" for p in ("q", "kv")
    },
    **{f"layers.{{}}.{p}_b_proj.weight": f"{ATTENTION}.kv_b_proj.weight" for p in "kv"},
}
# Fields of the config, and what is taken where one leaves them out.
DEFAULTS = {
    **hugging_face.without(hugging_face.LLAMA, "head_dim"),
    "attention_bias": False,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "latent_norm_eps": 1e-6,  # which no config of Hugging Face states
    "moe_layer_freq": 1,
}


def latent_options(config: Fields, interleaved: bool, partly: bool = False) -> Options:
    """``usual_options``, and a ``mixer`` with latent attention.

    interleaved  whether the two values of a rotary pair are neighbours
    partly       whether ``partial_rotary_factor`` counts, which then has to be 1
    """
    turned = dimension(config, "qk_rope_head_dim")
    fields = {**config, "head_dim": turned}
    if partly and fields["partial_rotary_factor"] is None:
        fields["partial_rotary_factor"] = 1.0
    options = usual_options(fields, d_ffn="moe_intermediate_size", partly=partly)
    heads, key_values = options["num_attention_heads"], options["num_key_value_heads"]
    if key_values != heads:
        raise FormatError(
            f"config: num_key_value_heads is {key_values}, not {heads} as num_attention_heads is"
        )
    rank = config["q_lora_rank"]
    mixer = LatentAttentionConfig(
        hidden_size=options["hidden_size"],
        num_attention_heads=heads,
        kv_lora_rank=dimension(config, "kv_lora_rank"),
        q_lora_rank=None if rank is None else dimension(config, "q_lora_rank"),
        qk_nope_head_dim=dimension(config, "qk_nope_head_dim"),
        qk_rope_head_dim=turned,
        v_head_dim=dimension(config, "v_head_dim"),
        latent_norm=NormConfig("rms", number(config, "latent_norm_eps", zero=True)),
        attention_bias=flag(config, "attention_bias"),
        **_of_long_texts(rope_parameters(config), options["rotary"].kind),
        interleaved=interleaved,
        rotary=options["rotary"],
    )
    return {**options, "mixer": mixer}


def _of_long_texts(found: Fields, kind: str) -> Options:
    """``yarn_weight`` and ``yarn_factor``, of parameters of rotary positions."""
    if kind == "default" or not found.get("mscale_all_dim"):
        return {}
    return {
        "yarn_weight": number(found, "mscale_all_dim"),
        "yarn_factor": number(found, "factor"),
    }


def refuse_others(config: Fields, **usual: object) -> None:
    """Raise FormatError where a field says of experts what is not ``usual``, and not known here."""
    for key, value in usual.items():
        if config[key] != value:
            raise FormatError(
                f"config: {key} {shown(config[key])} is not supported; supported: {shown(value)}"
            )


def sizes_of(layer: LayerConfig) -> LatentAttentionConfig:
    """The mixer of a layer that has latent attention."""
    assert isinstance(layer.mixer, LatentAttentionConfig), layer.mixer.name
    return layer.mixer


def _halves(sizes: LatentAttentionConfig) -> AnyArray:
    """Where the values that are turned lie in a checkpoint: first those that come first in a pair,
    then the others."""
    turned = np.arange(sizes.qk_rope_head_dim)
    return turned.reshape(-1, 2).T.reshape(-1) if sizes.interleaved else turned


def _queries(layer: LayerConfig) -> AnyArray:
    """The rows of queries: of each head those that are not turned, then those that are."""
    sizes = sizes_of(layer)
    nope = sizes.qk_nope_head_dim
    of_head = np.concatenate([np.arange(nope), nope + _halves(sizes)])
    heads = np.arange(sizes.num_attention_heads) * sizes.qk_head_dim
    return (heads[:, None] + of_head).reshape(-1)


def _latents(layer: LayerConfig) -> AnyArray:
    """The rows of latents, and then those of keys that are turned."""
    sizes = sizes_of(layer)
    rank = sizes.kv_lora_rank
    return np.concatenate([np.arange(rank), rank + _halves(sizes)])


def of_heads(part: str) -> Rows:
    """Rows of a packed kv_b_proj: of each head its "k", then its "v"."""

    def rows(layer: LayerConfig) -> AnyArray:
        sizes = sizes_of(layer)
        nope, width = sizes.qk_nope_head_dim, sizes.v_head_dim
        of_head = np.arange(nope) if part == "k" else np.arange(nope, nope + width)
        heads = np.arange(sizes.num_attention_heads) * (nope + width)
        return (heads[:, None] + of_head).reshape(-1)

    return rows


OF_QUERIES_AND_LATENTS: dict[str, Rows] = {
    "q_proj": _queries,
    "q_b_proj": _queries,
    "kv_a_proj": _latents,
}
OF_HEADS: dict[str, Rows] = {f"{p}_b_proj": of_heads(p) for p in "kv"}
ROWS = {**OF_QUERIES_AND_LATENTS, **OF_HEADS}
TURNED_HEADS: dict[str, Callable[[LayerConfig], int]] = {
    "k_b_proj": lambda layer: sizes_of(layer).num_attention_heads
}
