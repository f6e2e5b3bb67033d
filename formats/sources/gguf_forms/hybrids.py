"""The forms of models with Mamba-2 layers among others."""

from ...bounded_json import JsonObject
from ..gguf_metadata import one_of
from .dense import granite_scales
from .form import BLOCK, KINDS, LAYER, RMS, GgufForm
from .header import Header
from .mixtures import SIGMOID, router_with_groups

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
NEURONS = "feed_forward_length"  # 0: the layer is no FFN, where each is one block


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


def _nemotron_h(header: Header, config: JsonObject) -> JsonObject:
    """Each layer is Mamba-2, attention, an FFN or experts. llama.cpp has no least time step, and
    takes the epsilon of layer norms where none of mean squares is stated."""
    epsilon = config["layer_norm_epsilon"]
    width, heads = header.of("ssm.inner_size"), header.of("ssm.time_step_rank")
    if not (width and heads) or width % heads:
        raise header.refusal("ssm.inner_size")
    key_heads, neurons = header.of_layers(KEY_HEADS), header.of_layers(NEURONS)
    if key_heads is None or neurons is None:
        raise header.refusal(KEY_HEADS if key_heads is None else NEURONS)
    kinds = []
    for block, (attends, feeds) in enumerate(zip(key_heads, neurons, strict=True)):
        routed = f"blk.{block}.ffn_up_exps.weight" in header.tensors
        ffn = "moe" if routed else "mlp"
        kinds.append("full_attention" if attends else ffn if feeds else "linear_attention")
    header.of("expert_shared_count")  # whose neurons are stated, all together
    return {
        "layer_norm_epsilon": header.of(LAYER, float) if epsilon is None else epsilon,
        "layers_block_type": kinds,
        "intermediate_size": max(neurons),
        "mlp_hidden_act": config["hidden_act"],
        "mamba_num_heads": heads,
        "mamba_head_dim": width // heads,
        "mamba_hidden_act": "silu",
        "n_groups": header.of("ssm.group_count"),
        "ssm_state_size": header.of("ssm.state_size"),
        "conv_kernel": header.of("ssm.conv_kernel"),
        "use_conv_bias": "ssm_conv1d.bias" in header.kinds,
        "use_bias": "ssm_in.bias" in header.kinds,
        "time_step_min": 0.0,
        "moe_shared_expert_intermediate_size": header.of("expert_shared_feed_forward_length"),
        **router_with_groups(header),
    }


BLOCKS = {**MAMBA2, "layers.{}.ffn_norm.weight": f"{BLOCK}.attn_norm.weight"}
HYBRIDS = (
    GgufForm(
        architecture="granitehybrid", model_type="granitemoehybrid", paired=True,
        experts="num_local_experts", fields=_granite_hybrid, by_layer=(KEY_HEADS,), names=MAMBA2,
    ),
    *(
        GgufForm(
            architecture=name, model_type="nemotron_h", activation="relu2", ffn="plain",
            epsilon=("layer_norm_epsilon", RMS), partly_rotary=True, blocks=True,
            experts="n_routed_experts", fields=_nemotron_h, by_layer=(KEY_HEADS, NEURONS),
            names=BLOCKS, harmless={"expert_gating_func": one_of(0, SIGMOID)},
        )
        for name in ("nemotron_h", "nemotron_h_moe")
    ),
)  # fmt: skip
