"""The metadata of a GGUF model that may be left unread, because it does not change the result.

A key of the model's architecture is either read; or listed, here or in the architecture's form,
with the values that do not change the result (llama.cpp's converter writes some of them); or
refused.
"""

import math
from collections.abc import Callable, Container, Mapping
from typing import Any

from ..bounded_json import JsonObject
from ..errors import FormatError, shown

Harmless = Callable[[Any, JsonObject], bool]  # (the value of a key, the config) -> whether it is


def refuse_strangers(
    metadata: Mapping[str, Any],
    architecture: str,
    known: Container[str],
    config: JsonObject,
    own: Mapping[str, Harmless] | None = None,
) -> None:
    """Raise FormatError naming a key of the architecture that could change the result.

    known   the keys that were read, without the architecture before them
    config  the Hugging Face config that was made of them
    own     what the architecture has in HARMLESS otherwise
    """
    harmless = {**HARMLESS, **(own or {})}
    for key, value in metadata.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or name in known or name in UNUSED:
            continue
        if name not in harmless or not _is_harmless(harmless[name], value, config):
            raise FormatError(f"metadata {shown(key)} is {shown(value)}, which is not supported")


def _is_harmless(harmless: Harmless, value: Any, config: JsonObject) -> bool:
    """Whether a key's value changes no result. Values that cannot be computed with are not."""
    if not isinstance(value, (int, float)):
        return False
    try:
        return harmless(value, config)
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
    ):  # absurd, or none
        return False


def one_of(*values: float) -> Harmless:
    """Whether a value is one of these."""
    return lambda value, config: value in values


def _equals(field: str) -> Harmless:
    """Whether a value equals a field of the config."""
    return lambda value, config: bool(value == config[field])


def _of_full_attention(config: JsonObject) -> JsonObject:
    """The rotary positions of layers that see all, where others have their own."""
    rope: JsonObject = config["rope_parameters"]
    return rope.get("full_attention", rope)


def _no_window(value: float, config: JsonObject) -> bool:
    """Whether an attention window is as long as the longest text, or 0, which means no window."""
    return value == 0 or value >= float(config["max_position_embeddings"] or math.inf)


def _usual_scale(value: float, config: JsonObject) -> bool:
    """Whether attention's scale is 1 / sqrt(head_dim), for which 0 stands, too."""
    return value == 0 or math.isclose(value * value * (config["head_dim"] or 0), 1, rel_tol=1e-6)


def _softmax(value: float, config: JsonObject) -> bool:
    """Whether a gating function is a softmax whose weights come out as in the config.

    1 is a softmax over all experts, 3 one over those chosen; normalised, they are the same.
    """
    return value in (0, 1) or (value == 3 and bool(config.get("norm_topk_prob", False)))


# Keys that never change a decoder's logits: the vocabulary's size is known from the embedding's
# rows, the layout's name is a remark, pooling follows the last norm, and an architecture uses only
# one of the two epsilons.
UNUSED = (
    "vocab_size",
    "tensor_data_layout",
    "pooling_type",
    "decoder_start_token_id",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
)
# {key: whether a value of it leaves the result unchanged}; in most of them 0 means "not used".
HARMLESS: dict[str, Harmless] = {
    # Widths
    "embedding_length_out": _equals("hidden_size"),
    "attention.value_length": _equals("head_dim"),
    "attention.key_length_swa": _equals("head_dim"),
    "attention.value_length_swa": _equals("head_dim"),
    # Attention
    "attention.causal": one_of(True),
    "attention.scale": _usual_scale,
    "attention.sliding_window": _no_window,
    "attention.sliding_window_pattern": lambda value, config: config["sliding_window"] is None,
    "attention.shared_kv_layers": one_of(0),
    "attention.max_alibi_bias": one_of(0),
    "attention.clamp_kqv": one_of(0),
    "attention.temperature_length": one_of(0),
    "attention.temperature_scale": one_of(0),
    "attn_logit_softcapping": one_of(0),
    "final_logit_softcapping": one_of(0),
    "router_logit_softcapping": one_of(0),
    # Rotary positions
    "rope.dimension_count_swa": lambda value, config: bool(
        config["partial_rotary_factor"] == 1.0 and value == config["head_dim"]
    ),
    "rope.freq_base_swa": lambda value, config: bool(
        value == _of_full_attention(config)["rope_theta"]
    ),
    "rope.scale_linear": one_of(0, 1),
    "rope.scaling.finetuned": one_of(True, False),
    "rope.scaling.attn_factor": one_of(1),
    "rope.scaling.yarn_attn_factor": one_of(1),
    "rope.scaling.yarn_log_multiplier": one_of(0),
    "rope.scaling.yarn_ext_factor": lambda value, config: bool(
        value == (_of_full_attention(config)["rope_type"] == "yarn")
    ),
    "rope.scaling.yarn_beta_fast": one_of(32),
    "rope.scaling.yarn_beta_slow": one_of(1),
    # Blocks and their factors
    "use_parallel_residual": one_of(False),
    "swin_norm": one_of(False),
    "embedding_scale": one_of(0, 1),
    "residual_scale": one_of(0, 1),
    "logit_scale": one_of(0, 1),
    # Experts
    "leading_dense_block_count": one_of(0),
    "interleave_moe_layer_step": one_of(0, 1),
    "nextn_predict_layers": one_of(0),
    "expert_used_count": one_of(0),
    "expert_feed_forward_length": one_of(0),
    "expert_chunk_feed_forward_length": one_of(0),
    "expert_shared_feed_forward_length": one_of(0),
    "expert_shared_count": one_of(0),
    "expert_group_count": one_of(0, 1),
    "expert_group_used_count": one_of(0, 1),
    "expert_weights_scale": one_of(0, 1),
    "expert_weights_norm": lambda value, config: bool(value == config.get("norm_topk_prob", value)),
    "expert_gating_func": _softmax,
}
