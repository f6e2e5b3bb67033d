"""The form of Gemma 4: two kinds of layers, which differ in heads, and keys that some share."""

import math

from ...architectures.gemma4 import FULL, SLIDING
from ...bounded_json import JsonObject
from .form import BLOCK, PARTS, GgufForm
from .header import Header

CONTEXT = "layers.{}.per_layer.context.weight"
NORMS = {
    "shared_after_norm": "post_ffw_norm_1",
    "experts_norm": "pre_ffw_norm_2",
    "experts_after_norm": "post_ffw_norm_2",
    "per_layer.after_norm": "post_norm",
}
NAMES = {
    **{f"layers.{{}}.{ours}.weight": f"{BLOCK}.{theirs}.weight" for ours, theirs in NORMS.items()},
    **{f"layers.{{}}.shared.{part}.weight": f"{BLOCK}.ffn_{part}.weight" for part in PARTS},
    "layers.{}.router_norm.weight": f"{BLOCK}.ffn_gate_inp.scale",
    "layers.{}.router.expert_scales": f"{BLOCK}.ffn_down_exps.scale",
    "layers.{}.output_scale": f"{BLOCK}.layer_output_scale.weight",
    "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    CONTEXT: "per_layer_model_proj.weight",
    "layers.{}.per_layer.context_norm.weight": "per_layer_proj_norm.weight",
    "layers.{}.per_layer.gate.weight": f"{BLOCK}.inp_gate.weight",
    "layers.{}.per_layer.proj.weight": f"{BLOCK}.proj.weight",
}
BORROWED = tuple(f"{BLOCK}.attn_{part}.weight" for part in ("k", "v", "k_norm"))
KEY_HEADS, NEURONS = "attention.head_count_kv", "feed_forward_length"
NOT_TURNED = 1e20  # factors of rotary positions by which angles become none


def _gemma4(header: Header, config: JsonObject) -> JsonObject:
    """What Gemma 4's config says otherwise. llama.cpp lets layers without keys of their own read
    those of the last two that have some."""
    layers, shared = header.layers(), header.of("attention.shared_kv_layers") or 0
    kinds = config.get("layer_types") or [SLIDING if (n + 1) % 6 else FULL for n in range(layers)]
    own = kinds[: max(0, layers - shared)]
    if kinds[-1] != FULL or (shared and own[-2:] != [SLIDING, FULL]):
        raise header.refusal("attention.sliding_window_pattern")
    far, near = header.of("attention.key_length"), header.of("attention.key_length_swa")
    for key, width in (
        ("attention.value_length", far),
        ("attention.value_length_swa", near),
        ("rope.dimension_count_swa", near),
    ):
        if header.of(key, int, width) != width:
            raise header.refusal(key)
    key_heads = header.of_layers(KEY_HEADS) or [None] * layers
    embeddings = header.tensors.get("per_layer_token_embd.weight")
    return {
        **_neurons(header, config, shared),
        "hidden_activation": config["hidden_act"],
        "layer_types": kinds,
        "layer_scalar": "layer_output_scale.weight" in header.kinds,
        "head_dim": near,
        "per_layer_config": {
            str(layer): {"head_dim": far if kind == FULL else near, "num_key_value_heads": heads}
            for layer, (kind, heads) in enumerate(zip(kinds, key_heads, strict=True))
        },
        "num_kv_shared_layers": shared,
        "attention_k_eq_v": f"blk.{kinds.index(FULL)}.attn_v.weight" not in header.tensors,
        "hidden_size_per_layer_input": header.of("embedding_length_per_layer_input") or 0,
        "vocab_size_per_layer_input": embeddings.shape[0] if embeddings else None,
        "final_logit_softcapping": header.of("final_logit_softcapping", float, 30.0) or None,
        "rope_parameters": _rope(header, config),
        "enable_moe_block": bool(header.of("expert_count")),
        "num_experts": header.of("expert_count"),
        "top_k_experts": header.of("expert_used_count"),
        "moe_intermediate_size": header.of("expert_feed_forward_length"),
    }


def _neurons(header: Header, config: JsonObject, shared: int) -> JsonObject:
    """How many neurons layers have, of which those without keys of their own may have twice as
    many as the others."""
    neurons = header.of_layers(NEURONS) or []
    own, others = set(neurons[: len(neurons) - shared]), set(neurons[len(neurons) - shared :])
    least = min(neurons, default=None)
    if own != {least} or (shared and others not in ({least}, {2 * (least or 0)})):
        raise header.refusal(NEURONS)
    return {"intermediate_size": least, "use_double_wide_mlp": bool(shared) and others != own}


def _rope(header: Header, config: JsonObject) -> JsonObject:
    """The rotary positions of both kinds of layers: of those that see all the first pairs of a head
    are turned, which a file says by a factor of each pair."""
    far = config["rope_parameters"]
    near = {"rope_type": "default", "rope_theta": header.of("rope.freq_base_swa", float, 10000.0)}
    if far["rope_type"] == "longrope":
        factors = far["short_factor"]
        turned = sum(factor == 1 for factor in factors)
        if factors[:turned] != [1.0] * turned or min(factors[turned:], default=1e30) < NOT_TURNED:
            raise header.refusal("rope.scaling.type")
        # The next larger number, so that its product with head_dim is not rounded below ``turned``.
        share = 1.0 if turned == len(factors) else math.nextafter(turned / len(factors), math.inf)
        far = {
            "rope_type": "proportional",
            "rope_theta": far["rope_theta"],
            "partial_rotary_factor": share if turned else 0.0,
        }
    elif far["rope_type"] != "default":
        raise header.refusal("rope.scaling.type")
    return {FULL: far, SLIDING: near}


GEMMA4 = (
    GgufForm(
        architecture="gemma4",
        model_type="gemma4_text",
        activation="gelu_pytorch_tanh",
        windows=6,
        fields=_gemma4,
        by_layer=(KEY_HEADS, NEURONS),
        names=NAMES,
        stacked=(CONTEXT,),
        borrowed=BORROWED,
    ),
)
