"""The form of models with latent attention: GGUF's deepseek2 is DeepSeek V2 and V3, and others.

What makes keys and values of latents is two tensors in llama.cpp's newer files, of which that of
keys is transposed, and one tensor in its older files.
"""

from ...architectures.latent_attention import OF_QUERIES_AND_LATENTS
from ...bounded_json import JsonObject
from ...numbers import is_whole
from .form import BLOCK, GgufForm
from .header import Header
from .mixtures import SIGMOID, SOFTMAX, experts_after_dense

# GLM-4.7-Flash's first files do not state its gating function; these are its layers and tokens.
GLM_LAYERS, GLM_TOKENS = (47, 48), 154880
TENTH = 10  # GGUF states a tenth of YaRN's mscale_all_dim


def _deepseek2(header: Header, config: JsonObject) -> JsonObject:
    layers, further = header.layers_and_further()
    turned, rank = header.of("rope.dimension_count"), header.of("attention.q_lora_rank")
    keys, values = (header.of(f"attention.{part}_length_mla") for part in ("key", "value"))
    of_cache = config["head_dim"], header.of("attention.value_length")
    keys, values = (keys, values) if keys and values else of_cache
    return {
        **_experts(header, config),
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": further,
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": None,
        "partial_rotary_factor": None,
        "rope_parameters": _rope(header, config),
        "rope_interleave": True,
        "kv_lora_rank": header.of("attention.kv_lora_rank"),
        "q_lora_rank": rank if "attn_q_a.weight" in header.kinds else None,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": keys - turned if is_whole(keys) and is_whole(turned) else None,
        "v_head_dim": values,
        "latent_norm_eps": config["rms_norm_eps"],
        "moe_layer_freq": 1,
    }


def _rope(header: Header, config: JsonObject) -> JsonObject:
    """Rotary positions, none or YaRN's: llama.cpp turns by no other here as it says."""
    rope: JsonObject = config["rope_parameters"]
    tenth = header.of("rope.scaling.yarn_log_multiplier", float)
    if rope["rope_type"] not in ("default", "yarn"):
        raise header.refusal("rope.scaling.type")
    if rope["rope_type"] == "default":
        return rope
    if not tenth:
        raise header.refusal("rope.scaling.yarn_log_multiplier")
    weight = float(f"{TENTH * tenth:.6g}")  # as the model's config has it, of a float32
    return {**rope, "mscale": weight, "mscale_all_dim": weight}


def _experts(header: Header, config: JsonObject) -> JsonObject:
    """Experts by softmax are DeepSeek V2's, which takes groups by their best expert; those by
    sigmoid V3's, by their best two."""
    usual = SOFTMAX
    if header.layers() in GLM_LAYERS and config["vocab_size"] == GLM_TOKENS:
        usual = SIGMOID
    gating = header.of("expert_gating_func") or usual
    if gating not in (SOFTMAX, SIGMOID):
        raise header.refusal("expert_gating_func")
    of_kind: JsonObject = {
        "model_type": "deepseek_v3", "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    }  # fmt: skip
    if gating == SOFTMAX:
        groups = header.of("expert_group_count") or 1
        method = "group_limited_greedy" if groups > 1 else "greedy"
        of_kind = {
            "model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": method,
        }  # fmt: skip
    return {**of_kind, **experts_after_dense(header, config)}


LATENT = (
    GgufForm(
        architecture="deepseek2", model_type="deepseek_v3", experts="n_routed_experts",
        partly_rotary=True, fields=_deepseek2, rows=OF_QUERIES_AND_LATENTS,
        names={
            "layers.{}.q_a_proj.weight": f"{BLOCK}.attn_q_a.weight",
            "layers.{}.q_b_proj.weight": f"{BLOCK}.attn_q_b.weight",
            "layers.{}.kv_a_proj.weight": f"{BLOCK}.attn_kv_a_mqa.weight",
            **{f"layers.{{}}.{p}_a_norm.weight": f"{BLOCK}.attn_{p}_a_norm.weight"
               for p in ("q", "kv")},
            **{f"layers.{{}}.{p}_b_proj.weight":
               f"{BLOCK}.attn_{p}_b.weight|{BLOCK}.attn_kv_b.weight" for p in "kv"},
        },
    ),
)  # fmt: skip
