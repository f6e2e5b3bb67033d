"""The forms of mixtures of experts; Mixtral's is that of Llama, in dense.py."""

from ...bounded_json import JsonObject
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


MIXTURES = (
    GgufForm(architecture="olmoe", model_type="olmoe", fields=_not_normalised),
    GgufForm(
        architecture="qwen2moe", model_type="qwen2_moe", fields=_not_normalised,
        harmless={"expert_shared_count": one_of(0, 1)},
    ),
    GgufForm(architecture="qwen3moe", model_type="qwen3_moe"),
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
