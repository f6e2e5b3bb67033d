"""The configs of the kit's models: every architecture that is supported, and every option.

They are small, so that all of them together are some megabytes, and no size is a multiple of a
vector register where the architecture allows another one.
"""

from dataclasses import dataclass
from typing import Any, Literal

from flashinfer.formats.architectures import architecture
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.fields import ABSENT

COMMON: JsonObject = {
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
OPT: JsonObject = {
    **COMMON,
    "model_type": "opt",
    "hidden_size": 40,  # no multiple of a vector
    "ffn_dim": 72,
    "word_embed_proj_dim": 40,
}
LLAMA: JsonObject = {
    **COMMON,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_key_value_heads": 2,
}


def like(model_type: str, **options: Any) -> JsonObject:
    """The config of an architecture that follows Llama."""
    return {**LLAMA, "model_type": model_type, **options}


def mixture(model_type: str, **options: Any) -> JsonObject:
    """The config of a mixture of experts, of which a token uses three."""
    return like(model_type, num_experts_per_tok=3, **options)


# Of models with latent attention, whose widths are of many kinds.
LATENT: JsonObject = {
    **LLAMA,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}


def latent(model_type: str, **options: Any) -> JsonObject:
    """The config of an architecture that follows DeepSeek V2."""
    return {**LATENT, "model_type": model_type, **options}


def rope(kind: str, **parameters: Any) -> JsonObject:
    """The options of rotary positions of one kind."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **parameters}}


FALCON: JsonObject = {
    **COMMON,
    "model_type": "falcon",
    "hidden_size": 40,
    "ffn_hidden_size": 72,
}
GPT2: JsonObject = {
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_positions": 48,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
GRANITE: JsonObject = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
DELTA_NET: JsonObject = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 24,
}
MAMBA: JsonObject = {
    "mamba_n_heads": 10, "mamba_d_head": 8, "mamba_d_state": 12, "shared_intermediate_size": 56,
}  # fmt: skip
NEMOTRON_H: JsonObject = {
    **{key: value for key, value in LLAMA.items() if key != "num_hidden_layers"},
    "model_type": "nemotron_h",
    "head_dim": 12,
    "mamba_num_heads": 6,
    "mamba_head_dim": 10,
    "ssm_state_size": 12,
    "n_groups": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 56,
}
NEAR, FAR = "sliding_attention", "full_attention"
GEMMA4_MOE = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3}


def gemma4(layer_types: list[str], **options: Any) -> JsonObject:
    """The config of a Gemma 4, whose heads of layers that see all are wider."""
    return like("gemma4_text", **{
        "head_dim": 12, "global_head_dim": 20, "sliding_window": 9, "layer_types": layer_types,
        "num_hidden_layers": len(layer_types), "rope_parameters": {
            NEAR: {"rope_type": "default", "rope_theta": 100.0},
            FAR: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1000.0},
        },
    } | options)  # fmt: skip


def gemma3n(layer_types: list[str], **options: Any) -> JsonObject:
    """The config of a Gemma 3n."""
    return like("gemma3n_text", **{
        "head_dim": 12, "sliding_window": 9, "layer_types": layer_types,
        "num_hidden_layers": len(layer_types), "hidden_size_per_layer_input": 12,
        "laurel_rank": 10, "final_logit_softcapping": 3.0, "rope_parameters": {
            NEAR: {"rope_type": "default", "rope_theta": 100.0},
            FAR: {"rope_type": "default", "rope_theta": 1000.0},
        },
    } | options)  # fmt: skip


CONFIGS: dict[str, JsonObject] = {
    "opt-plain": OPT,
    "opt-untied": {**OPT, "tie_word_embeddings": False},
    "opt-post-norm-projected": {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24},
    "opt-no-bias": {**OPT, "enable_bias": False},
    "opt-no-affine": {**OPT, "layer_norm_elementwise_affine": False},
    "opt-no-final-norm": {**OPT, "_remove_final_layer_norm": True},
    "llama-silu": like("llama"),
    "llama-relu-bias": like("llama", hidden_act="relu", attention_bias=True, mlp_bias=True),
    "llama-gelu-tied": like("llama", hidden_act="gelu", tie_word_embeddings=True, head_dim=12),
    "llama-linear": like("llama", **rope("linear", factor=4.0)),
    "llama-dynamic": like(
        "llama", max_position_embeddings=24, **rope("dynamic", factor=2.0)
    ),
    "llama-llama3": like("llama", **rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )),
    "llama-yarn": like("llama", **rope(
        "yarn", factor=4.0, original_max_position_embeddings=12,
    )),
    "llama-yarn-mscale": like("llama", **rope(
        "yarn", factor=4.0, original_max_position_embeddings=12, beta_fast=16.0, beta_slow=2.0,
        mscale=0.8, mscale_all_dim=0.5, truncate=False,
    )),
    "mistral": like("mistral", sliding_window=9),
    "qwen2": like("qwen2"),
    "qwen2-sliding": like(
        "qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": like("qwen3", head_dim=16),
    "falcon-7b": FALCON,
    "falcon-new": {
        **FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "activation": "relu",
    },
    "falcon-new-one-norm": {
        **FALCON, "new_decoder_architecture": True, "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
    },
    "falcon-rw-alibi": {
        **FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True,
        "hidden_size": 48, "num_attention_heads": 6,
    },
    "falcon-silu-untied": {**FALCON, "activation": "silu", "tie_word_embeddings": False},
    "persimmon": like("persimmon", hidden_size=48),
    "persimmon-no-qk-norm": like("persimmon", hidden_size=48, qk_layernorm=False),
    "phi": like("phi", hidden_size=48),
    "phi-qk-norm": like("phi", hidden_size=48, qk_layernorm=True, num_key_value_heads=4),
    "phi3": like("phi3", sliding_window=11, original_max_position_embeddings=48),
    "phi3-longrope": like("phi3", original_max_position_embeddings=16, **rope(
        "longrope", short_factor=[1.0, 1.1, 1.3, 1.6, 2.0], long_factor=[1.0, 1.5, 2.5, 4.0, 6.0],
    )),
    "prosparse": like("sparsellama", hidden_act="fatrelu", hidden_act_param=0.05),
    "bamboo": like("bamboo", hidden_act="relu", sliding_window=None),
    "nemotron": like("nemotron", head_dim=12),
    "arcee": like("arcee"),
    "gemma": like("gemma", head_dim=16),
    "gemma2": like("gemma2", head_dim=16, sliding_window=9, query_pre_attn_scalar=24,
                   attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": like("gemma3_text", head_dim=16, sliding_window=9, num_hidden_layers=7,
                   rope_parameters={
                       "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                       "full_attention": {"rope_type": "linear", "rope_theta": 1000.0,
                                          "factor": 8.0},
                   }),
    "olmoe": mixture("olmoe", num_experts=8, intermediate_size=24, num_key_value_heads=4),
    "qwen2-moe": mixture("qwen2_moe", num_experts=8, moe_intermediate_size=24,
                         shared_expert_intermediate_size=56),
    "qwen3-moe": mixture("qwen3_moe", num_experts=8, moe_intermediate_size=24,
                         norm_topk_prob=True, head_dim=12),
    "mixtral": mixture("mixtral", num_local_experts=8, intermediate_size=24),
    "granitemoe": mixture("granitemoe", num_local_experts=8, intermediate_size=24, **GRANITE),
    "gpt-oss": mixture("gpt_oss", num_local_experts=8, hidden_size=64, intermediate_size=32,
                       head_dim=16, sliding_window=8),
    "mixtral-relu": mixture("mixtral", num_local_experts=8, intermediate_size=24,
                            hidden_act="relu"),
    "qwen2-moe-dense": mixture("qwen2_moe", num_experts=8, moe_intermediate_size=24,
                               shared_expert_intermediate_size=56, num_hidden_layers=4,
                               mlp_only_layers=[1], use_sliding_window=True, sliding_window=7,
                               max_window_layers=3),
    "qwen3-moe-dense": mixture("qwen3_moe", num_experts=8, moe_intermediate_size=24, head_dim=12,
                               num_hidden_layers=4, decoder_sparse_step=2, hidden_act="relu"),
    "dots1": mixture("dots1", n_routed_experts=8, n_shared_experts=2, moe_intermediate_size=24,
                     num_hidden_layers=3, first_k_dense_replace=1, n_group=4, topk_group=2,
                     routed_scaling_factor=2.5, sliding_window=9, max_window_layers=2),
    "glm4-moe": mixture("glm4_moe", n_routed_experts=8, moe_intermediate_size=24, head_dim=12,
                        num_hidden_layers=3, first_k_dense_replace=2, use_qk_norm=True,
                        attention_bias=True, routed_scaling_factor=1.5),
    "smallthinker": {
        **LLAMA, "model_type": "smallthinker", "head_dim": 12, "num_hidden_layers": 5,
        "moe_ffn_hidden_size": 24, "moe_num_primary_experts": 8,
        "moe_num_active_primary_experts": 3, "sliding_window_size": 9,
        "rope_layout": [0, 1, 1, 1, 0], "sliding_window_layout": [0, 1, 1, 1, 0],
    },
    "smallthinker-softmax": {
        **LLAMA, "model_type": "smallthinker", "head_dim": 12, "moe_ffn_hidden_size": 24,
        "moe_num_primary_experts": 8, "moe_num_active_primary_experts": 3,
        "moe_primary_router_apply_softmax": True, "tie_word_embeddings": False,
    },
    "lfm2": like("lfm2", num_hidden_layers=4, norm_eps=1e-5, block_multiple_of=8,
                 layer_types=["conv", "full_attention", "conv", "conv"]),
    "lfm2-bias": like("lfm2", num_hidden_layers=3, conv_bias=True, conv_L_cache=4,
                      block_auto_adjust_ff_dim=False, full_attn_idxs=[1],
                      tie_word_embeddings=False),
    "lfm2-moe": mixture("lfm2_moe", num_hidden_layers=4, num_dense_layers=1, num_experts=8,
                        moe_intermediate_size=24, routed_scaling_factor=1.5,
                        layer_types=["conv", "conv", "full_attention", "conv"]),
    "qwen3-next": mixture("qwen3_next", **DELTA_NET, num_experts=8, moe_intermediate_size=24,
                          shared_expert_intermediate_size=56, num_hidden_layers=5, head_dim=16,
                          mlp_only_layers=[1]),
    "qwen3-5": like("qwen3_5_text", **DELTA_NET, num_hidden_layers=3, head_dim=16,
                    layer_types=["linear_attention", "full_attention", "linear_attention"]),
    "qwen3-5-moe": mixture("qwen3_5_moe_text", **DELTA_NET, num_experts=8, head_dim=16,
                           moe_intermediate_size=24, shared_expert_intermediate_size=56,
                           num_hidden_layers=4, attention_bias=True),
    "granite-hybrid": mixture("granitemoehybrid", **GRANITE, **MAMBA, num_hidden_layers=3,
                              num_local_experts=8, intermediate_size=24,
                              layer_types=["mamba", "attention", "mamba"]),
    "granite-hybrid-dense": like("granitemoehybrid", **GRANITE, **MAMBA, num_local_experts=0,
                                 num_experts_per_tok=0, mamba_n_groups=2, mamba_proj_bias=True,
                                 mamba_conv_bias=False, tie_word_embeddings=True,
                                 time_step_limit=[0.3, 1.5], layer_types=["mamba", "attention"]),
    "granite-hybrid-rope": like("granitemoehybrid", **GRANITE, **MAMBA, num_local_experts=0,
                                position_embedding_type="rope", attention_bias=True,
                                layer_types=["full_attention", "linear_attention"]),
    "nemotron-h": {**NEMOTRON_H, "hybrid_override_pattern": "M-M*-", "mlp_bias": True},
    "nemotron-h-moe": {**NEMOTRON_H, "hybrid_override_pattern": "MEM*EM",
                       "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2,
                       "num_experts_per_tok": 3},
    "gpt-neox": like("gpt_neox", hidden_size=64),
    "gpt-neox-in-turn": like("gpt_neox", hidden_size=64, use_parallel_residual=False,
                             attention_bias=False, hidden_act="relu", rotary_pct=0.5,
                             rotary_emb_base=500),
    "gpt2": GPT2,
    "gpt2-scaled": {**GPT2, "n_inner": 72, "activation_function": "relu",
                    "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
                    "tie_word_embeddings": False},
    "smollm3": like("smollm3", num_hidden_layers=4),
    "smollm3-sliding": like("smollm3", num_hidden_layers=3, no_rope_layers=[0, 1, 0],
                            use_sliding_window=True, sliding_window=9, attention_bias=True,
                            tie_word_embeddings=False),
    "ministral3": like("ministral3", head_dim=12, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=12, mscale=1.0, mscale_all_dim=1.0,
        llama_4_scaling_beta=0.3,
    )),
    "olmo2": like("olmo2"),
    "olmo3": like("olmo3", num_hidden_layers=5, sliding_window=9, rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
                           "original_max_position_embeddings": 12},
    }),
    "hunyuan": like("hunyuan_v1_dense", head_dim=16),
    "hunyuan-alpha": like("hunyuan_v1_dense", head_dim=12, attention_bias=True,
                          **rope("dynamic", alpha=50.0, factor=1.0)),
    "hunyuan-moe": like("hunyuan_v1_moe", head_dim=12, num_experts=8, moe_topk=[3, 2],
                        intermediate_size=24),
    "phimoe": like("phimoe", num_local_experts=8, intermediate_size=24, attention_bias=True,
                   lm_head_bias=True, router_jitter_noise=0.3),
    "flex-olmo": mixture("flex_olmo", num_experts=8, intermediate_size=24),
    "granite": like("granite", **GRANITE, attention_bias=True, mlp_bias=True),
    "ernie4-5": like("ernie4_5", head_dim=12, use_bias=True),
    "ernie4-5-moe": like("ernie4_5_moe", moe_num_experts=8, moe_k=3, moe_num_shared_experts=2,
                         moe_intermediate_size=24, num_hidden_layers=5, moe_layer_interval=2,
                         moe_layer_end_index=3, tie_word_embeddings=False),
    "nanochat": like("nanochat", final_logit_softcapping=3.0),
    "bitnet": like("bitnet"),
    "deepseek-v2": latent("deepseek_v2", first_k_dense_replace=1, attention_bias=True,
                          topk_method="group_limited_greedy", n_group=4, topk_group=2,
                          routed_scaling_factor=2.0),
    "deepseek-v2-lite": latent("deepseek_v2", q_lora_rank=None, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=12, mscale=0.7, mscale_all_dim=0.7,
    )),
    "deepseek-v3": latent("deepseek_v3", first_k_dense_replace=1, n_group=4, topk_group=2, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=12, mscale=1.0, mscale_all_dim=1.0,
    )),
    "deepseek-v3-halves": latent("deepseek_v3", first_k_dense_replace=0, n_group=1, topk_group=1,
                                 rope_interleave=False, q_lora_rank=None, attention_bias=True,
                                 norm_topk_prob=False),
    "glm4-moe-lite": latent("glm4_moe_lite", num_hidden_layers=3,
                            mlp_layer_types=["sparse", "dense", "sparse"]),
    "gemma4": gemma4(
        hidden_size_per_layer_input=0, attention_k_eq_v=True, num_global_key_value_heads=1,
        final_logit_softcapping=3.0, layer_types=[NEAR, NEAR, FAR],
    ),
    "gemma4-shared": gemma4(
        hidden_size_per_layer_input=12, vocab_size_per_layer_input=97, num_kv_shared_layers=3,
        use_double_wide_mlp=True, layer_types=[NEAR, FAR, NEAR, FAR, NEAR, FAR],
    ),
    "gemma4-moe": gemma4(
        **GEMMA4_MOE, hidden_size_per_layer_input=0, moe_intermediate_size=24,
        layer_types=[NEAR, FAR],
    ),
    "gemma3n": gemma3n(
        layer_types=[NEAR, FAR, NEAR, FAR, FAR], intermediate_size=[72, 56, 72, 72, 72],
        activation_sparsity_pattern=[0.95, 0.0, 0.6, 0.0, 0.95], num_kv_shared_layers=2,
        vocab_size_per_layer_input=90,
    ),
    "gemma3n-other-state": gemma3n(
        layer_types=[NEAR, FAR, NEAR], activation_sparsity_pattern=[0.0, 0.0, 0.5],
        num_kv_shared_layers=0, altup_num_inputs=3, altup_active_idx=2, altup_correct_scale=False,
        vocab_size_per_layer_input=96, attention_bias=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class KitModel:
    """A model of the kit.

    config   its Hugging Face config; fields that it leaves out have the values of its config class
    packing  how the checkpoint holds weights: "plain", of experts each matrix in a tensor of its
             own; all experts of a layer in two tensors ("fused"), or so in blocks of 4 bits
             ("mxfp4"); projections in 8 bits with a scale for each block ("fp8")
    gguf     the number formats in which it is written as GGUF, too
    """

    name: str
    config: JsonObject
    packing: Literal["plain", "fused", "mxfp4", "fp8"] = "plain"
    gguf: tuple[str, ...] = ()

    @property
    def model_type(self) -> str:
        """The architecture's name."""
        return self.config["model_type"]

    def hugging_face_config(self) -> JsonObject:
        """The contents of config.json, which leaves nothing to the defaults of a library."""
        defaults = architecture(self.config).DEFAULTS
        known = {k: value for k, value in defaults.items() if value not in (None, ABSENT)}
        return {**known, **self.config, "dtype": "float32"}


WIDE = {"hidden_size": 64, "intermediate_size": 96, "bos_token_id": 1, "head_dim": 16}
WIDE_MIXTURE = {**WIDE, "intermediate_size": 32, "moe_intermediate_size": 32}
WIDE_MAMBA: JsonObject = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "shared_intermediate_size": 64,
}
WIDE_LATENT = {
    "hidden_size": 64, "intermediate_size": 96, "bos_token_id": 1, "kv_lora_rank": 32,
    "q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "moe_intermediate_size": 32,
}  # fmt: skip
WIDE_NEMOTRON_H: JsonObject = {
    **WIDE,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "time_step_min": 0.0,
}
WIDE_FALCON = {
    **FALCON, "hidden_size": 64, "ffn_hidden_size": 96, "bos_token_id": 1,
    "new_decoder_architecture": True, "num_kv_heads": 2,
}  # fmt: skip
# llama.cpp has heads of keys and of values of one size.
WIDE_NET = {
    **WIDE, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "eos_token_id": 2,
}  # fmt: skip
BLOCKS = ("f16", "q8_0", "q4_0")
# Those written as GGUF, too: their rows are whole blocks of 32.
WIDE_GEMMA4 = {**WIDE, "global_head_dim": 32}
GGUF_MODELS = (
    KitModel("gguf-llama", like("llama", **WIDE), gguf=BLOCKS),
    KitModel("gguf-llama-linear", like("llama", **WIDE, **rope("linear", factor=4.0)),
             gguf=("f16",)),
    KitModel("gguf-llama-llama3", like("llama", **WIDE, **rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )), gguf=("f16",)),
    KitModel("gguf-llama-yarn", like("llama", **WIDE, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=12,
    )), gguf=("f16",)),
    KitModel("gguf-phi3-longrope", like(
        "phi3", **WIDE, original_max_position_embeddings=16,
        **rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0],
               long_factor=[1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0]),
    ), gguf=("f16",)),
    KitModel("gguf-bamboo", like("bamboo", **WIDE, hidden_act="relu", sliding_window=None),
             gguf=("f16",)),
    KitModel("gguf-qwen2", like("qwen2", **WIDE), gguf=BLOCKS),
    KitModel("gguf-qwen3", like("qwen3", **WIDE), gguf=BLOCKS),
    KitModel("gguf-gemma", like("gemma", **WIDE), gguf=BLOCKS),
    KitModel("gguf-falcon", WIDE_FALCON, gguf=BLOCKS),
    KitModel("gguf-falcon-one-norm", {**WIDE_FALCON, "num_ln_in_parallel_attn": 1}, gguf=("f16",)),
    KitModel("gguf-phi", like("phi", **WIDE), gguf=("f16",)),
    KitModel("gguf-phi3", like("phi3", **WIDE), gguf=BLOCKS),
    KitModel("gguf-nemotron", like("nemotron", **WIDE), gguf=("f16",)),
    KitModel("gguf-olmoe", mixture("olmoe", **WIDE_MIXTURE, num_experts=8, num_key_value_heads=4),
             gguf=BLOCKS),
    KitModel("gguf-qwen2-moe", mixture("qwen2_moe", **WIDE_MIXTURE, num_experts=8,
                                       shared_expert_intermediate_size=64), gguf=BLOCKS),
    KitModel("gguf-qwen3-moe", mixture("qwen3_moe", **WIDE_MIXTURE, num_experts=8,
                                       norm_topk_prob=True), gguf=("f16",)),
    KitModel("gguf-mixtral", mixture("mixtral", **WIDE_MIXTURE, num_local_experts=8),
             gguf=("f16",)),
    KitModel("gguf-granitemoe", mixture(
        "granitemoe", **WIDE_MIXTURE, num_local_experts=8, **GRANITE,
    ), gguf=("f16",)),
    KitModel("gguf-gpt-oss", mixture("gpt_oss", **WIDE_MIXTURE, num_local_experts=8,
                                     sliding_window=8), "fused", gguf=("f16",)),
    KitModel("gguf-smallthinker", {
        **LLAMA, **WIDE, "model_type": "smallthinker", "num_hidden_layers": 5,
        "moe_ffn_hidden_size": 32, "moe_num_primary_experts": 8,
        "moe_num_active_primary_experts": 3,
        "rope_layout": [0, 1, 1, 1, 0], "sliding_window_layout": [0, 1, 1, 1, 0],
    }, gguf=("f16",)),
    KitModel("gguf-smallthinker-softmax", {
        **LLAMA, **WIDE, "model_type": "smallthinker", "moe_ffn_hidden_size": 32,
        "moe_num_primary_experts": 8, "moe_num_active_primary_experts": 3,
        "moe_primary_router_apply_softmax": True,
    }, gguf=BLOCKS),
    KitModel("gguf-lfm2", like(
        "lfm2", **WIDE, num_hidden_layers=4, block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv", "conv"],
    ), gguf=("f16",)),
    KitModel("gguf-lfm2-moe", mixture(
        "lfm2_moe", **WIDE, moe_intermediate_size=32, num_hidden_layers=4, num_dense_layers=1,
        num_experts=8, layer_types=["conv", "conv", "full_attention", "conv"],
    ), gguf=("f16",)),
    KitModel("gguf-qwen3-next", mixture(
        "qwen3_next", **WIDE_NET, moe_intermediate_size=32, num_experts=8, num_hidden_layers=4,
        shared_expert_intermediate_size=64,
    ), gguf=("f16",)),
    KitModel("gguf-qwen3-5", like("qwen3_5_text", **WIDE_NET, num_hidden_layers=4), gguf=("f16",)),
    KitModel("gguf-qwen3-5-moe", mixture(
        "qwen3_5_moe_text", **WIDE_NET, moe_intermediate_size=32, num_experts=8,
        num_hidden_layers=4, shared_expert_intermediate_size=64,
    ), gguf=("f16",)),
    KitModel("gguf-gpt-neox", like("gpt_neox", **WIDE), gguf=BLOCKS),
    KitModel("gguf-gpt2", {**GPT2, "n_embd": 64, "bos_token_id": 1}, gguf=BLOCKS),
    KitModel("gguf-arcee", like("arcee", **WIDE), gguf=BLOCKS),
    KitModel("gguf-gemma2", like(
        "gemma2", **WIDE, num_hidden_layers=3, sliding_window=9, query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    ), gguf=BLOCKS),
    KitModel("gguf-gemma3", like(
        "gemma3_text", **WIDE, num_hidden_layers=7, sliding_window=9, query_pre_attn_scalar=16,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
        },
    ), gguf=("f16",)),
    KitModel("gguf-dots1", mixture(
        "dots1", **{**WIDE_MIXTURE, "intermediate_size": 96}, n_routed_experts=8,
        num_key_value_heads=4, n_shared_experts=2, num_hidden_layers=3, first_k_dense_replace=1,
        n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
    ), gguf=BLOCKS),
    KitModel("gguf-glm4-moe", mixture(
        "glm4_moe", **{**WIDE_MIXTURE, "intermediate_size": 96}, n_routed_experts=8,
        num_hidden_layers=3, first_k_dense_replace=2, use_qk_norm=True, attention_bias=True,
        routed_scaling_factor=1.5,
    ), gguf=BLOCKS),
    KitModel("gguf-granite", like("granite", **WIDE, **GRANITE, attention_bias=True),
             gguf=("f16",)),
    KitModel("gguf-ernie4-5", like("ernie4_5", **WIDE, tie_word_embeddings=False),
             gguf=BLOCKS),
    KitModel("gguf-ernie4-5-moe", like(
        "ernie4_5_moe", **{**WIDE_MIXTURE, "intermediate_size": 96}, moe_num_experts=8, moe_k=3,
        moe_num_shared_experts=2, num_hidden_layers=3, moe_layer_start_index=1,
    ), gguf=("f16",)),
    KitModel("gguf-smollm3", like(
        "smollm3", **WIDE, num_hidden_layers=5, tie_word_embeddings=False,
    ), gguf=BLOCKS),
    KitModel("gguf-ministral3", like("ministral3", **WIDE, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=12, mscale=1.0, mscale_all_dim=1.0,
        llama_4_scaling_beta=0.3,
    )), gguf=("f16",)),
    KitModel("gguf-olmo2", like("olmo2", **WIDE), gguf=BLOCKS),
    KitModel("gguf-olmo3", like(
        "olmo3", **WIDE, num_hidden_layers=5, sliding_window=9, rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "full_attention": {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
                               "original_max_position_embeddings": 12},
        },
    ), gguf=("f16",)),
    KitModel("gguf-hunyuan", like("hunyuan_v1_dense", **WIDE), gguf=BLOCKS),
    KitModel("gguf-hunyuan-moe", like("hunyuan_v1_moe", **WIDE_MIXTURE, num_experts=8, moe_topk=3),
             gguf=("f16",)),
    KitModel("gguf-granite-hybrid", mixture(
        "granitemoehybrid", **WIDE_MIXTURE, **GRANITE, **WIDE_MAMBA, num_hidden_layers=3,
        num_local_experts=8, layer_types=["mamba", "attention", "mamba"],
    ), gguf=BLOCKS),
    KitModel("gguf-granite-hybrid-rope", like(
        "granitemoehybrid", **{**WIDE, "intermediate_size": 96}, **GRANITE, **{
            **WIDE_MAMBA, "shared_intermediate_size": 96,
        }, num_local_experts=0, position_embedding_type="rope", mamba_n_groups=2,
        layer_types=["attention", "mamba"],
    ), gguf=("f16",)),
    KitModel("gguf-deepseek-v2", latent(
        "deepseek_v2", **{**WIDE_LATENT, "q_lora_rank": None}, num_hidden_layers=3,
        first_k_dense_replace=1, routed_scaling_factor=2.0, **rope(
            "yarn", factor=4.0, original_max_position_embeddings=12, mscale=0.7,
            mscale_all_dim=0.7,
        ),
    ), gguf=("f16",)),
    KitModel("gguf-deepseek-v3", latent(
        "deepseek_v3", **WIDE_LATENT, num_hidden_layers=3, first_k_dense_replace=1, n_group=4,
        topk_group=2, **rope(
            "yarn", factor=4.0, original_max_position_embeddings=12, mscale=1.0,
            mscale_all_dim=1.0,
        ),
    ), gguf=BLOCKS),
    KitModel("gguf-glm4-moe-lite", latent(
        "glm4_moe_lite", **WIDE_LATENT, num_hidden_layers=3, rms_norm_eps=1e-6,
    ), gguf=("f16",)),
    KitModel("gguf-nemotron-h", {
        **NEMOTRON_H, **WIDE_NEMOTRON_H, "hybrid_override_pattern": "M-MM*-",
    }, gguf=("f16",)),
    KitModel("gguf-nemotron-h-moe", {
        **NEMOTRON_H, **WIDE_NEMOTRON_H, "hybrid_override_pattern": "MEM*EM",
        "num_experts_per_tok": 3, "routed_scaling_factor": 2.5,
    }, gguf=BLOCKS),
    KitModel("gguf-gemma3n", gemma3n(
        [NEAR, FAR, NEAR], **WIDE, hidden_size_per_layer_input=32, laurel_rank=32,
        vocab_size_per_layer_input=96, num_kv_shared_layers=0, final_logit_softcapping=30.0,
        activation_sparsity_pattern=[0.95] * 3,
    ), gguf=BLOCKS),
    KitModel("gguf-gemma4", gemma4(
        **WIDE_GEMMA4, hidden_size_per_layer_input=0, attention_k_eq_v=True,
        num_global_key_value_heads=1, final_logit_softcapping=3.0, layer_types=[NEAR, NEAR, FAR],
    ), gguf=("f16",)),
    KitModel("gguf-gemma4-shared", gemma4(
        **WIDE_GEMMA4, hidden_size_per_layer_input=32, vocab_size_per_layer_input=96,
        num_kv_shared_layers=3, use_double_wide_mlp=True,
        layer_types=[NEAR, NEAR, FAR, NEAR, NEAR, FAR],
    ), gguf=BLOCKS),
    KitModel("gguf-gemma4-moe", gemma4(
        **WIDE_GEMMA4, **GEMMA4_MOE, hidden_size_per_layer_input=0, moe_intermediate_size=32,
        layer_types=[NEAR, FAR],
    ), "fused", gguf=BLOCKS),
)  # fmt: skip
ALWAYS_FUSED = ("gpt-oss", "gemma4-moe")  # whose checkpoints have all of a layer's experts in one
FUSED = ("mixtral", "qwen2-moe", "granitemoe")  # also written with all of a layer's experts fused
MODELS: tuple[KitModel, ...] = (
    *(KitModel(name, config, "fused" if name in ALWAYS_FUSED else "plain")
      for name, config in CONFIGS.items()),
    *(KitModel(f"{name}-fused", CONFIGS[name], "fused") for name in FUSED),
    KitModel("gpt-oss-mxfp4", {
        **CONFIGS["gpt-oss"], "quantization_config": {"quant_method": "mxfp4"},
    }, "mxfp4"),
    KitModel("qwen3-fp8", {**like("qwen3", **WIDE), "quantization_config": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 8],
    }}, "fp8"),
    *GGUF_MODELS,
)  # fmt: skip
