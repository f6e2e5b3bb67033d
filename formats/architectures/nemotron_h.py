"""Nemotron-H and Nemotron 3 (NVIDIA 2025): Mamba-2, attention without positions, squared ReLU.

Each of its layers is one block, a mixer or an FFN. One of ours is a mixer and the FFN behind it,
which some have none of.
"""

from typing import Any

from ..config import MOST_LAYERS, ByLayer, ModelConfig, model_of
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag, kind_of, number
from ..layers.mamba2 import Mamba2Config
from ..layers.norm import NormConfig
from . import hugging_face, mamba2
from .hugging_face import activation, dimensions
from .mixtures import sigmoid_router
from .recurrent import CONVOLUTIONS, VALUES

__all__ = [
    "ALIASES", "BLOCKS", "CONVOLUTIONS", "DEFAULTS", "DENSE_FFN", "FFN", "FURTHER_NAMES",
    "FUSED_FFN", "FUSED_ROWS", "MODEL_TYPES", "NAMES", "VALUES", "model_config",
]  # fmt: skip
MODEL_TYPES = ("nemotron_h",)
BLOCKS = True
FURTHER_NAMES = ("mtp.",)


def _both(name: str) -> str:
    """The names of a tensor in NVIDIA's checkpoints, and in those of transformers."""
    return f"backbone.{name}|model.{name}"


MIXER = "layers.{}.mixer"
NAMES = {
    "embed_tokens.weight": _both("embeddings.weight"),
    "final_norm.weight": _both("norm_f.weight"),
    **{
        f"layers.{{}}.{p}_norm.weight": _both("layers.{}.norm.weight") for p in ("attention", "ffn")
    },
    **{f"layers.{{}}.{p}_proj.weight": _both(f"{MIXER}.{p}_proj.weight") for p in "qkvo"},
    **{ours: _both(theirs) for ours, theirs in mamba2.names(MIXER).items()},
    **{f"layers.{{}}.ffn.{p}_bias": _both(f"{MIXER}.{p}_proj.bias") for p in ("up", "down")},
    "layers.{}.router.weight": _both(f"{MIXER}.gate.weight"),
    "layers.{}.router.choice_bias": _both(f"{MIXER}.gate.e_score_correction_bias"),
    **{
        f"layers.{{}}.shared.{p}.weight": _both(f"{MIXER}.shared_experts.{p}_proj.weight")
        for p in ("up", "down")
    },
}
DENSE_FFN = {p: _both(f"{MIXER}.{p}_proj.weight") for p in ("up", "down")}
FFN = {p: _both(f"{MIXER}.experts.{{expert}}.{p}_proj.weight") for p in ("up", "down")}
FUSED_FFN = {p: _both(f"{MIXER}.experts.{p}_proj") for p in ("up", "down")}
FUSED_ROWS: dict[str, hugging_face.Rows] = {}
MAMBA, ATTENTION, EXPERTS, DENSE = "linear_attention", "full_attention", "moe", "mlp"
KINDS = {MAMBA: MAMBA, "mamba": MAMBA, ATTENTION: ATTENTION, "attention": ATTENTION,
         EXPERTS: EXPERTS, DENSE: DENSE}  # fmt: skip
PATTERN = {"M": MAMBA, "*": ATTENTION, "E": EXPERTS, "-": DENSE}
DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "layers_block_type": None,
    "hybrid_override_pattern": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "intermediate_size": 21504,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "n_groups": 8,
    "conv_kernel": 4,
    "time_step_min": 0.001,
    "use_conv_bias": True,
    "use_bias": False,
    "n_routed_experts": 8,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "moe_latent_size": None,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "layer_norm_epsilon": 1e-5,
}
ALIASES = {
    "layer_types": "layers_block_type",
    "num_local_experts": "n_routed_experts",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_conv_bias": "use_conv_bias",
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a NemotronHConfig (a dict). Raises FormatError."""
    kinds = _kinds(config)
    if config["moe_latent_size"] is not None and EXPERTS in kinds:
        raise FormatError("config: moe_latent_size is not supported: experts of a narrower input")
    by_layer = _layers(config, kinds)
    # transformers has a head of its own, whatever tie_word_embeddings says.
    fixed = {"num_hidden_layers": len(by_layer), "tie_word_embeddings": False}
    options = dimensions({**config, **fixed})
    return model_of(
        **options,
        **activation(config, "mlp_hidden_act"),
        gated=False,
        norm_epsilon=number(config, "layer_norm_epsilon", zero=True),
        by_layer=by_layer,
    )


def _kinds(config: Fields) -> list[str]:
    """What each of the checkpoint's layers is: one of KINDS' values."""
    kinds, pattern = config["layers_block_type"], config["hybrid_override_pattern"]
    if kinds is None and pattern is not None:
        if not isinstance(pattern, str) or not set(pattern) <= PATTERN.keys():
            raise FormatError(
                f"config: hybrid_override_pattern is {shown(pattern)}, not letters of "
                f"{''.join(PATTERN)}"
            )
        kinds = [PATTERN[letter] for letter in pattern]
    kinds = [MAMBA, EXPERTS, ATTENTION, DENSE] if kinds is None else kinds
    if not isinstance(kinds, list) or not 0 < len(kinds) <= MOST_LAYERS:
        raise FormatError(f"config: layers_block_type is {shown(kinds)}, not a list of layers")
    return [kind_of("layers_block_type", kind, KINDS) for kind in kinds]


def _layers(config: Fields, kinds: list[str]) -> ByLayer:
    """By layer: its mixer, and the FFN behind it. Raises FormatError where an FFN has no mixer
    before it."""
    found: list[dict[str, Any]] = []
    for place, kind in enumerate(kinds):
        if kind in (MAMBA, ATTENTION):
            mixer = {"mixer": _mamba(config)} if kind == MAMBA else {}
            found.append({**mixer, "d_ffn": 0})
        elif not found or found[-1]["d_ffn"]:
            raise FormatError(
                f"config: layer {place} is a feed-forward network without a mixer before it, which "
                "is not supported"
            )
        else:
            found[-1].update(_dense(config) if kind == DENSE else _experts(config))
    return found


def _dense(config: Fields) -> dict[str, Any]:
    return {"d_ffn": dimension(config, "intermediate_size"), "ffn_bias": flag(config, "mlp_bias")}


def _experts(config: Fields) -> dict[str, Any]:
    if flag(config, "mlp_bias"):
        raise FormatError("config: mlp_bias of a model with experts is not supported")
    shared = dimension(config, "moe_shared_expert_intermediate_size")
    neurons = dimension(config, "moe_intermediate_size")
    return {**sigmoid_router(config), "d_ffn": neurons, "shared_d_ffn": shared}


def _mamba(config: Fields) -> Mamba2Config:
    """The Mamba-2 of a layer. transformers takes no time step below ``time_step_min``, and looks at
    no other limit."""
    return Mamba2Config(
        hidden_size=dimension(config, "hidden_size"),
        heads=dimension(config, "mamba_num_heads"),
        head_dim=dimension(config, "mamba_head_dim"),
        groups=dimension(config, "n_groups"),
        state_size=dimension(config, "ssm_state_size"),
        kernel=dimension(config, "conv_kernel"),
        activation=activation(config, "mamba_hidden_act")["activation"],
        steps=(number(config, "time_step_min", zero=True), None),
        norm=NormConfig("rms", number(config, "layer_norm_epsilon", zero=True)),
        conv_bias=flag(config, "use_conv_bias"),
        proj_bias=flag(config, "use_bias"),
    )
