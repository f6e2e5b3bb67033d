"""The forms of models whose layers need not have attention."""

from collections.abc import Callable, Mapping

from ...architectures import qwen3_next
from ...bounded_json import JsonObject
from ..gguf_metadata import one_of
from .form import BLOCK, RMS, GgufForm
from .header import Header
from .mixtures import after_dense

CONVOLUTIONS: Mapping[str, str] = {
    "final_norm.weight": "token_embd_norm.weight",
    **{
        f"layers.{{}}.{p}.{kind}": f"{BLOCK}.shortconv.{p}.{kind}"
        for p in ("in_proj", "conv", "out_proj")
        for kind in ("weight", "bias")
    },
}
NETS: Mapping[str, str] = {
    "layers.{}.ffn_norm.weight": f"{BLOCK}.post_attention_norm.weight",
    "layers.{}.g_proj.weight": f"{BLOCK}.attn_q.weight",
    "layers.{}.g_proj.bias": f"{BLOCK}.attn_q.bias",
    "layers.{}.in_proj.weight": f"{BLOCK}.attn_qkv.weight",
    "layers.{}.z_proj.weight": f"{BLOCK}.attn_gate.weight",
    "layers.{}.a_proj.weight": f"{BLOCK}.ssm_alpha.weight",
    "layers.{}.b_proj.weight": f"{BLOCK}.ssm_beta.weight",
    "layers.{}.out_proj.weight": f"{BLOCK}.ssm_out.weight",
    "layers.{}.conv.weight": f"{BLOCK}.ssm_conv1d.weight",
    "layers.{}.decay": f"{BLOCK}.ssm_a",
    "layers.{}.dt_bias": f"{BLOCK}.ssm_dt.bias",
    "layers.{}.gated.weight": f"{BLOCK}.ssm_norm.weight",
}
NET_HARMLESS = {"expert_shared_count": one_of(0, 1)}


def _lfm2(header: Header, config: JsonObject) -> JsonObject:
    """A layer without keys and values has a short convolution."""
    heads = header.of_layers("attention.head_count_kv") or []
    kinds = ["full_attention" if n else "conv" for n in heads]
    return {
        "layer_types": kinds,
        "conv_L_cache": header.of("shortconv.l_cache"),
        "conv_bias": "shortconv.in_proj.bias" in header.kinds,
        "block_auto_adjust_ff_dim": False,
    }


def _lfm2_moe(header: Header, config: JsonObject) -> JsonObject:
    fields = after_dense(header, config)
    return {
        **_lfm2(header, config),
        "intermediate_size": fields["intermediate_size"],
        "num_dense_layers": fields["first_k_dense_replace"],
        "use_expert_bias": "exp_probs_b.bias" in header.kinds,
        "routed_scaling_factor": fields["routed_scaling_factor"],
    }


def _nets(tiled: bool) -> Callable[[Header, JsonObject], JsonObject]:
    """The fields of gated delta nets.

    tiled  the heads of values that share a head of keys do not lie side by side
    """

    def fields(header: Header, config: JsonObject) -> JsonObject:
        layers, _ = header.layers_and_further()
        # Which rotary positions stand for places in an image: in a text all are the same.
        header.known.add("rope.dimension_sections")
        values, inner = header.of("ssm.time_step_rank"), header.of("ssm.inner_size")
        if not values or not inner or inner % values:
            raise header.refusal("ssm.inner_size")
        kinds = None
        if header.is_list("attention.recurrent_layers"):
            recurrent = header.of_layers("attention.recurrent_layers", bool) or []
            kinds = ["linear_attention" if r else "full_attention" for r in recurrent]
            kinds = kinds[:layers]
        return {
            "num_hidden_layers": layers,
            "linear_conv_kernel_dim": header.of("ssm.conv_kernel"),
            "linear_key_head_dim": header.of("ssm.state_size"),
            "linear_value_head_dim": inner // values,
            "linear_num_key_heads": header.of("ssm.group_count"),
            "linear_num_value_heads": values,
            "linear_value_heads_tiled": tiled,
            "layer_types": kinds,
            "full_attention_interval": header.of("full_attention_interval", int, 4),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    return fields


RECURRENT = (
    GgufForm(
        architecture="lfm2", model_type="lfm2", epsilon=("norm_eps", RMS), names=CONVOLUTIONS,
        by_layer=("attention.head_count_kv",), fields=_lfm2,
    ),
    GgufForm(
        architecture="lfm2moe", model_type="lfm2_moe", epsilon=("norm_eps", RMS),
        names=CONVOLUTIONS, by_layer=("attention.head_count_kv",), fields=_lfm2_moe,
    ),
    GgufForm(
        architecture="qwen3next", model_type="qwen3_next", packed_attention=False,
        partly_rotary=True,
        names={
            **NETS,
            **{f"layers.{{}}.{p}_proj.weight": f"{BLOCK}.ssm_ba.weight" for p in "ab"},
        },
        rows={**qwen3_next.OF_ATTENTION, **{p: qwen3_next.ROWS[p] for p in ("a_proj", "b_proj")}},
        fields=_nets(tiled=False), harmless=NET_HARMLESS,
    ),
    GgufForm(
        architecture="qwen35", model_type="qwen3_5_text", packed_attention=False,
        partly_rotary=True, names=NETS, rows=qwen3_next.OF_ATTENTION, fields=_nets(tiled=True),
        harmless=NET_HARMLESS,
    ),
    GgufForm(
        architecture="qwen35moe", model_type="qwen3_5_moe_text", packed_attention=False,
        partly_rotary=True, names=NETS, rows=qwen3_next.OF_ATTENTION, fields=_nets(tiled=True),
        harmless=NET_HARMLESS,
    ),
)  # fmt: skip
