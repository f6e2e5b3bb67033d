"""Gemma 3n (2025), its texts: several hidden states of a token, of which each layer computes one; a
path of small rank beside attention; and first layers of whose gates only the largest count."""

from statistics import NormalDist
from typing import Any

import numpy as np

from ..config import ModelConfig, Options, model_of
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag, of_layers
from ..layers.altup import MOST_STATES, AltUpConfig
from ..layers.norm import NormConfig
from ..numbers import is_number, is_whole
from . import gemma4, hugging_face
from .gemma4 import (
    BORROWED,
    FULL,
    SLIDING,
    STACKED,
    per_layer_inputs,
    shared_memories,
    shared_options,
)
from .hugging_face import FFN
from .rope import longest, parameters_of_kinds, rotary

__all__ = [
    "BORROWED", "DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "STACKED", "model_config",
]  # fmt: skip
MODEL_TYPES = ("gemma3n_text",)
LAYER = "model.layers.{}"
OWN = {
    "altup.norm.weight": "altup.router_norm.weight",
    "altup.router.weight": "altup.modality_router.weight",
    "altup.predict.weight": "altup.prediction_coefs.weight",
    "altup.correct.weight": "altup.correction_coefs.weight",
    "altup.correct_scale": "altup.correct_output_scale",
    "laurel.left.weight": "laurel.linear_left.weight",
    "laurel.right.weight": "laurel.linear_right.weight",
    "laurel.norm.weight": "laurel.post_laurel_norm.weight",
}
STATES = {"in": "model.altup_projections", "out": "model.altup_unembed_projections"}
NAMES = {
    **gemma4.NAMES,
    **{f"layers.{{}}.{ours}": f"{LAYER}.{theirs}" for ours, theirs in OWN.items()},
    **{
        f"states.{way}.{i}.weight": f"{name}.{i}.weight"
        for way, name in STATES.items()
        for i in range(MOST_STATES - 1)
    },
}
DEFAULTS = {
    **hugging_face.without(
        hugging_face.LLAMA, "hidden_act", "original_max_position_embeddings",
    ),
    "vocab_size": 262400,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "attention_bias": False,
    "sliding_window": 512,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
    "activation_sparsity_pattern": None,
}  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Gemma3nTextConfig (a dict). Raises FormatError."""
    layers = dimension(config, "num_hidden_layers")
    neurons = neurons_of_layers(config, layers)
    far, near = parameters_of_kinds(config, config["rope_theta"], config["rope_local_base_freq"])
    options = {
        **shared_options({**config, "intermediate_size": neurons[0]}),
        "laurel_rank": dimension(config, "laurel_rank"),
    }
    options["rotary"] = rotary(config, far, options["head_dim"])
    most = longest(options["rotary"], options["max_position_embeddings"])
    kinds = config["layer_types"]
    if kinds is None:
        kinds = [FULL if (layer + 1) % 5 == 0 else SLIDING for layer in range(layers)]
    kinds = of_layers("layer_types", kinds, {SLIDING: SLIDING, FULL: FULL}, layers)
    dimension(config, "hidden_size_per_layer_input")
    own: dict[str, list[Any]] = {
        "d_ffn": neurons,
        "gate_cut": cuts_of_layers(config, layers),
        "per_layer": list(per_layer_inputs(config, options)),
    }
    window = {
        "attention_window": dimension(config, "sliding_window"),
        "rotary": rotary(config, near, options["head_dim"]),
    }
    return model_of(
        **{**options, "max_position_embeddings": most},
        altup=altup(config, options),
        per_layer_rows=dimension(config, "vocab_size_per_layer_input"),
        by_layer=[
            {
                **{key: values[layer] for key, values in own.items()},
                "matrices": own["gate_cut"][layer] is not None,
                **(window if kinds[layer] == SLIDING else {}),
                **memory,
            }
            for layer, memory in enumerate(shared_memories(config, kinds))
        ],
    )


def altup(config: Fields, options: Options) -> AltUpConfig:
    """How a layer goes on with the hidden states of a token."""
    active = config["altup_active_idx"]
    if not is_whole(active, 0):
        raise FormatError(f"config: altup_active_idx is {shown(active)}, not a whole number")
    return AltUpConfig(
        hidden_size=options["hidden_size"],
        states=dimension(config, "altup_num_inputs"),
        active=active,
        correct_scale=flag(config, "altup_correct_scale"),
        norm=NormConfig("rms", options["norm_epsilon"]),
    )


def neurons_of_layers(config: Fields, layers: int) -> list[int]:
    """How many neurons each layer has: one number for all, or one for each."""
    found = config["intermediate_size"]
    if not isinstance(found, list):
        return [dimension(config, "intermediate_size")] * layers
    if len(found) != layers:
        raise FormatError(f"config: intermediate_size is {shown(found)}, not a list of {layers}")
    return [dimension({"intermediate_size": n}, "intermediate_size") for n in found]


def cuts_of_layers(config: Fields, layers: int) -> list[float | None]:
    """Of each layer how many standard deviations its gates have to be above their mean, so that a
    share of them as large as ``activation_sparsity_pattern`` says would be silent if they were
    normally distributed; None: all gates count."""
    found = config["activation_sparsity_pattern"]
    if found is None:
        found = [0.95 if layers > 10 and layer < 10 else 0.0 for layer in range(layers)]
    if not isinstance(found, list) or len(found) != layers:
        raise FormatError(
            f"config: activation_sparsity_pattern is {shown(found)}, not a list of {layers}"
        )
    for share in found:
        if not is_number(share) or not 0 <= share < 1:
            raise FormatError(
                f"config: activation_sparsity_pattern has {shown(share)}, not a share below 1"
            )
    shares = [float(np.float32(share)) for share in found]
    return [float(np.float32(NormalDist().inv_cdf(s))) if s > 0 else None for s in shares]
