"""The forms of mixtures of experts; Mixtral's is that of Llama, in dense.py."""

from ...bounded_json import JsonObject
from ...errors import FormatError, shown
from ..gguf_metadata import one_of
from .form import BLOCK, GgufForm
from .header import Header


def _not_normalised(header: Header, config: JsonObject) -> JsonObject:
    """llama.cpp's code has it so; a file that states otherwise is refused."""
    return {"norm_topk_prob": False}


def _granitemoe(header: Header, config: JsonObject) -> JsonObject:
    """Granite's factors of embeddings, attention, blocks and logits."""
    return {
        "embedding_multiplier": header.of("embedding_scale", float),
        "attention_multiplier": header.of("attention.scale", float),
        "residual_multiplier": header.of("residual_scale", float),
        "logits_scaling": header.of("logit_scale", float),
    }


def _gpt_oss(header: Header, config: JsonObject) -> JsonObject:
    rope = config["rope_parameters"]
    return {"rope_parameters": {**rope, "truncate": False}} if rope["rope_type"] == "yarn" else {}


SCORINGS = {1: "softmax", 2: "sigmoid"}  # ``expert_gating_func``
NOT_TURNED = 4  # of so many layers the first has no rotary positions, and no window


def _smallthinker(header: Header, config: JsonObject) -> JsonObject:
    """Layers without rotary positions come with a window; the file does not say which they are."""
    layers, window = header.of("block_count") or 0, config["sliding_window"]
    scoring = header.of("expert_gating_func")
    if scoring not in SCORINGS:
        raise FormatError(
            f"{header.path}: metadata smallthinker.expert_gating_func is {shown(scoring)}; "
            f"supported: {', '.join(map(str, SCORINGS))}"
        )
    every_other = [int(window is not None and n % NOT_TURNED != 0) for n in range(layers)]
    return {
        "moe_ffn_hidden_size": config.get("moe_intermediate_size"),
        "moe_num_primary_experts": config.get("num_experts"),
        "moe_num_active_primary_experts": config.get("num_experts_per_tok"),
        "moe_primary_router_apply_softmax": SCORINGS[scoring] == "softmax",
        "sliding_window_size": window,
        "sliding_window_layout": every_other,
        "rope_layout": every_other if window else None,
        "use_qk_norm": False,
        "moe_enable_secondary_experts": False,
    }


MIXTURES = (
    GgufForm(architecture="olmoe", model_type="olmoe", fields=_not_normalised),
    GgufForm(
        architecture="qwen2moe", model_type="qwen2_moe", fields=_not_normalised,
        harmless={"expert_shared_count": one_of(0, 1)},
    ),
    GgufForm(architecture="qwen3moe", model_type="qwen3_moe"),
    GgufForm(
        architecture="smallthinker", model_type="smallthinker", activation="relu", windowed=True,
        fields=_smallthinker,
    ),
    GgufForm(
        architecture="granitemoe", model_type="granitemoe", paired=True,
        experts="num_local_experts", fields=_granitemoe,
        harmless={"rope.scaling.finetuned": one_of(True)},  # False: no rotary positions at all
    ),
    GgufForm(
        architecture="gpt-oss", model_type="gpt_oss", windowed=True,
        experts="num_local_experts", fields=_gpt_oss,
        names={"layers.{}.ffn_norm.weight": f"{BLOCK}.post_attention_norm.weight"},
        harmless={"attention.sliding_window_pattern": one_of(2)},
    ),
)  # fmt: skip
