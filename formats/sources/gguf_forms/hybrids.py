"""The forms of models with Mamba-2 layers among others."""

from ...bounded_json import JsonObject
from .dense import granite_scales
from .form import BLOCK, KINDS, GgufForm
from .header import Header

MAMBA2 = {
    **{f"layers.{{}}.in_proj.{k}": f"{BLOCK}.ssm_in.{k}" for k in KINDS},
    **{f"layers.{{}}.conv.{k}": f"{BLOCK}.ssm_conv1d.{k}" for k in KINDS},
    **{f"layers.{{}}.out_proj.{k}": f"{BLOCK}.ssm_out.{k}" for k in KINDS},
    "layers.{}.mixed_norm.weight": f"{BLOCK}.ssm_norm.weight",
    "layers.{}.dt_bias": f"{BLOCK}.ssm_dt.bias",
    "layers.{}.decay": f"{BLOCK}.ssm_a",
    "layers.{}.skip": f"{BLOCK}.ssm_d",
}
KEY_HEADS = "attention.head_count_kv"  # 0: the layer has no attention


def _granite_hybrid(header: Header, config: JsonObject) -> JsonObject:
    """Experts or none, rotary positions or none, and Mamba-2 in some layers."""
    width, heads = header.of("ssm.inner_size"), header.of("ssm.time_step_rank")
    hidden_size, key_heads = config["hidden_size"], header.of_layers(KEY_HEADS)
    if not (width and heads and hidden_size) or width % hidden_size or width % heads:
        raise header.refusal("ssm.inner_size")
    shared = header.of("expert_shared_feed_forward_length")
    experts = header.of("expert_count") or 0
    kinds = ["full_attention" if n else "linear_attention" for n in key_heads or []]
    turned = header.of("rope.scaling.finetuned", bool, True)  # which llama.cpp asks for that
    return {
        **granite_scales(header, config),
        "num_local_experts": experts,
        "num_key_value_heads": config["num_key_value_heads"] or None,
        "shared_intermediate_size": shared if experts else config["intermediate_size"],
        "position_embedding_type": "rope" if turned else None,
        "layer_types": kinds,
        "mamba_expand": width // hidden_size,
        "mamba_n_heads": heads,
        "mamba_d_head": width // heads,
        "mamba_n_groups": header.of("ssm.group_count"),
        "mamba_d_state": header.of("ssm.state_size"),
        "mamba_d_conv": header.of("ssm.conv_kernel"),
        "mamba_conv_bias": "ssm_conv1d.bias" in header.kinds,
        "mamba_proj_bias": "ssm_in.bias" in header.kinds,
        "time_step_limit": None,
    }


HYBRIDS = (
    GgufForm(
        architecture="granitehybrid", model_type="granitemoehybrid", paired=True,
        experts="num_local_experts", fields=_granite_hybrid, by_layer=(KEY_HEADS,), names=MAMBA2,
    ),
)  # fmt: skip
