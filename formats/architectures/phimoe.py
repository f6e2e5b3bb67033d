"""Phi-3.5-MoE (Abdin et al. 2024): Mixtral's experts, chosen two at a time by SparseMixer; norms
with biases."""

from dataclasses import replace

from ..config import ModelConfig, model_of
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag, number
from . import hugging_face, mixtral
from .hugging_face import attention_biases, usual_options
from .mixtral import FFN, FUSED_FFN
from .mixtures import FUSED_ROWS, mixture
from .rope import rope_parameters
from .windows import one_window

MODEL_TYPES = ("phimoe",)
MOE = "model.layers.{}.block_sparse_moe"
NAMES = {
    **mixtral.NAMES,
    "layers.{}.router.weight": f"{MOE}.gate.weight|model.layers.{{}}.mlp.router.weight",
    "layers.{}.attention_norm.bias": "model.layers.{}.input_layernorm.bias",
    "layers.{}.ffn_norm.bias": "model.layers.{}.post_attention_layernorm.bias",
    "final_norm.bias": "model.norm.bias",
}
DEFAULTS = {
    **hugging_face.LLAMA,
    "vocab_size": 32064,
    "intermediate_size": 6400,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "attention_bias": False,
    "lm_head_bias": False,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.01,
}
__all__ = [
    "DEFAULTS", "FFN", "FUSED_FFN", "FUSED_ROWS", "MODEL_TYPES", "NAMES", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a PhimoeConfig (a dict). Raises FormatError."""
    if dimension(config, "num_experts_per_tok") != 2:
        raise FormatError(
            f"config: num_experts_per_tok is {shown(config['num_experts_per_tok'])}; SparseMixer "
            "chooses 2"
        )
    # What stands beside the parameters of rotary positions is none of them.
    config = {**config, "original_max_position_embeddings": None}
    options = usual_options(config)
    rotary, found = options["rotary"], rope_parameters(config)
    if rotary.kind not in ("default", "longrope"):
        raise FormatError(f"config: rope_type {rotary.kind} is not supported here")
    if rotary.kind == "longrope":
        # transformers takes the short factors for long texts, too, and scales by the length alone.
        scales = {key: number(found, key) for key in ("short_mscale", "long_mscale")}
        parameters = {**rotary.parameters, "long_factor": rotary.parameters["short_factor"]}
        options["rotary"] = replace(rotary, parameters={**parameters, **scales})
    return model_of(
        **options,
        **attention_biases(config),
        norm="layer",
        head_bias=flag(config, "lm_head_bias"),
        **mixture(
            config, normalised=False, scoring="sparsemixer",
            jitter=number(config, "router_jitter_noise", zero=True),
        ),
        by_layer=one_window(config, options["num_hidden_layers"]),
    )  # fmt: skip
