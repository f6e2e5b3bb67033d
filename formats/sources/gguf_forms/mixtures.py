"""The forms of mixtures of experts; Mixtral's is that of Llama, in dense.py."""

from ...bounded_json import JsonObject
from ..gguf_metadata import one_of
from .dense import GRANITE_ROTARY, granite_scales
from .form import BLOCK, GgufForm
from .header import Header

SOFTMAX, SIGMOID = 1, 2  # of expert_gating_func
NOT_TURNED = 4  # of so many layers of SmallThinker the first has no rotary positions, no window


def _not_normalised(header: Header, config: JsonObject) -> JsonObject:
    """llama.cpp's code has it so; a file that states otherwise is refused."""
    return {"norm_topk_prob": False}


def _gpt_oss(header: Header, config: JsonObject) -> JsonObject:
    rope = config["rope_parameters"]
    return {"rope_parameters": {**rope, "truncate": False}} if rope["rope_type"] == "yarn" else {}


def _smallthinker(header: Header, config: JsonObject) -> JsonObject:
    """Layers without rotary positions come with a window; the file does not say which they are."""
    layers, window = header.layers(), config["sliding_window"]
    gating = header.of("expert_gating_func")
    if gating not in (SOFTMAX, SIGMOID):
        raise header.refusal("expert_gating_func")
    others = [int(window is not None and n % NOT_TURNED != 0) for n in range(layers)]
    return {
        "moe_ffn_hidden_size": config.get("moe_intermediate_size"),
        "moe_num_primary_experts": config.get("num_experts"),
        "moe_num_active_primary_experts": config.get("num_experts_per_tok"),
        "moe_primary_router_apply_softmax": gating == SOFTMAX,
        "sliding_window_size": window,
        "sliding_window_layout": others,
        "rope_layout": others if window else None,
        "use_qk_norm": False,
        "moe_enable_secondary_experts": False,
    }


def _glm4_moe(header: Header, config: JsonObject) -> JsonObject:
    """Its layers may be followed by some that predict further tokens, which are left out."""
    layers, further = header.layers_and_further()
    return {
        **after_dense(header, config, usual=SIGMOID),
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": further,
        "attention_bias": "attn_q.bias" in header.kinds,
        "use_qk_norm": "attn_q_norm.weight" in header.kinds,
    }


def _ernie4_5_moe(header: Header, config: JsonObject) -> JsonObject:
    return {
        "intermediate_size": config["ffn_hidden_size"],  # of the layers without experts
        "moe_k": config.get("num_experts_per_tok"),
        "moe_num_shared_experts": header.of("expert_shared_count", int, 0),
        "moe_layer_start_index": header.of("leading_dense_block_count", int, 0),
        "moe_layer_interval": header.of("interleave_moe_layer_step", int, 1) or 1,
        "moe_layer_end_index": -1,
    }


def after_dense(header: Header, config: JsonObject, usual: int | None = None) -> JsonObject:
    """Experts as DeepSeek V3 has them, after layers without.

    usual  the gating function where a file states none
    """
    if header.of("expert_gating_func", int, usual) != SIGMOID:
        raise header.refusal("expert_gating_func")
    return experts_after_dense(header, config)


def experts_after_dense(header: Header, config: JsonObject) -> JsonObject:
    """The same with whichever gating function."""
    return {
        "intermediate_size": config["ffn_hidden_size"],  # of the layers without
        "first_k_dense_replace": header.of("leading_dense_block_count", int, 0),
        "n_shared_experts": header.of("expert_shared_count"),
        **router_with_groups(header),
    }


def router_with_groups(header: Header) -> JsonObject:
    """The fields of a router as DeepSeek V3 has it."""
    groups = header.of("expert_group_count") or 1
    return {
        "n_group": groups,
        "topk_group": header.of("expert_group_used_count") or groups,
        "norm_topk_prob": header.of("expert_weights_norm", bool, False),
        "routed_scaling_factor": header.of("expert_weights_scale", float) or 1.0,
    }


MIXTURES = (
    GgufForm(architecture="olmoe", model_type="olmoe", fields=_not_normalised),
    GgufForm(
        architecture="qwen2moe", model_type="qwen2_moe", fields=_not_normalised,
        harmless={"expert_shared_count": one_of(0, 1)},
    ),
    GgufForm(architecture="qwen3moe", model_type="qwen3_moe"),
    GgufForm(
        architecture="smallthinker", model_type="smallthinker", activation="relu", windows=0,
        fields=_smallthinker,
    ),
    GgufForm(
        architecture="granitemoe", model_type="granitemoe", paired=True,
        experts="num_local_experts", fields=granite_scales,
        harmless=GRANITE_ROTARY,
    ),
    GgufForm(
        architecture="gpt-oss", model_type="gpt_oss", windows=2,
        experts="num_local_experts", fields=_gpt_oss,
        names={"layers.{}.ffn_norm.weight": f"{BLOCK}.post_attention_norm.weight"},
    ),
    GgufForm(
        architecture="hunyuan-moe", model_type="hunyuan_v1_moe",
        harmless={"expert_shared_count": one_of(1)},
    ),
    GgufForm(
        architecture="dots1", model_type="dots1", experts="n_routed_experts", fields=after_dense,
    ),
    GgufForm(
        architecture="glm4moe", model_type="glm4_moe", experts="n_routed_experts",
        partly_rotary=True, fields=_glm4_moe,
        names={"layers.{}.ffn_norm.weight": f"{BLOCK}.post_attention_norm.weight"},
    ),
    GgufForm(
        architecture="ernie4_5-moe", model_type="ernie4_5_moe", experts="moe_num_experts",
        paired=True, fields=_ernie4_5_moe, harmless={"expert_gating_func": one_of(0, 1)},
    ),
)  # fmt: skip
