"""The published shapes of models, as Hugging Face configs, for ``synth --like``.

A model whose own activation leaves no neuron silent is given a ReLU, as in its sparse versions
(ReLULLaMA, ProSparse, Bamboo); mixtures of experts keep theirs. All but OPT have an untied output
head, those included whose published model has a tied one (SmallThinker-4B, LFM2).
"""

from typing import Any

from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.errors import UserError

# hidden size, layers, heads, neurons
OPT = {
    "opt-125m": (768, 12, 12, 3072),
    "opt-350m": (1024, 24, 16, 4096),  # unlike the real one pre-norm, and without projections
    "opt-1.3b": (2048, 24, 32, 8192),
    "opt-2.7b": (2560, 32, 32, 10240),
    "opt-6.7b": (4096, 32, 32, 16384),
    "opt-13b": (5120, 40, 40, 20480),
}
# model_type, hidden size, layers, heads, key/value heads, neurons, vocabulary, further fields
Shape = tuple[str, int, int, int, int, int, int, dict[str, Any]]
GATED: dict[str, Shape] = {
    "tinyllama-1.1b": ("llama", 2048, 22, 32, 4, 5632, 32000, {}),
    "llama-2-7b": ("llama", 4096, 32, 32, 32, 11008, 32000, {}),
    "llama-2-13b": ("llama", 5120, 40, 40, 40, 13824, 32000, {}),
    "llama-3.2-1b": (
        "llama", 2048, 16, 32, 8, 8192, 128256, {"rope_theta": 5e5},
    ),
    "llama-3.1-8b": ("llama", 4096, 32, 32, 8, 14336, 128256, {"rope_theta": 5e5}),
    "mistral-7b": ("mistral", 4096, 32, 32, 8, 14336, 32000, {"sliding_window": 4096}),
    "qwen2.5-1.5b": (
        "qwen2", 1536, 28, 12, 2, 8960, 151936, {"rope_theta": 1e6},
    ),
    "qwen3-4b": (
        "qwen3", 2560, 36, 32, 8, 9728, 151936,
        {"rope_theta": 1e6, "head_dim": 128},
    ),
    "phi-3-mini": ("phi3", 3072, 32, 32, 32, 8192, 32064, {}),
}  # fmt: skip
PLAIN: dict[str, Shape] = {
    "falcon-7b": (
        "falcon", 4544, 32, 71, 1, 18176, 65024,
        {"parallel_attn": True, "multi_query": True, "activation": "relu"},
    ),
    "persimmon-8b": ("persimmon", 4096, 36, 64, 64, 16384, 262144, {"hidden_act": "relu2"}),
    "phi-2": ("phi", 2560, 32, 32, 32, 10240, 51200, {"partial_rotary_factor": 0.4}),
    "minitron-4b": (
        "nemotron", 3072, 32, 24, 8, 9216, 256000, {"hidden_act": "relu2", "head_dim": 128},
    ),
}  # fmt: skip
# The neurons are those of one expert; the further fields state the experts, and those per token.
MIXTURES: dict[str, Shape] = {
    "olmoe-1b-7b": (
        "olmoe", 2048, 16, 16, 16, 1024, 50304, {"num_experts": 64, "num_experts_per_tok": 8},
    ),
    "qwen1.5-moe-a2.7b": (
        "qwen2_moe", 2048, 24, 16, 16, 1408, 151936,
        {"num_experts": 60, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 5632,
         "rope_theta": 1e6},
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe", 2048, 48, 32, 4, 768, 151936,
        {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "head_dim": 128,
         "rope_theta": 1e6},
    ),
    "mixtral-8x7b": (
        "mixtral", 4096, 32, 32, 8, 14336, 32000,
        {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6},
    ),
    "granite-3.1-3b-a800m": (
        "granitemoe", 1536, 32, 24, 8, 512, 49155,
        {"num_local_experts": 40, "num_experts_per_tok": 8, "attention_multiplier": 0.015625,
         "rope_theta": 1e7},
    ),
    "gpt-oss-20b": (
        "gpt_oss", 2880, 24, 64, 8, 2880, 201088,
        {"num_local_experts": 32, "num_experts_per_tok": 4, "head_dim": 64,
         "attention_bias": True, "sliding_window": 128,
         "layer_types": ["sliding_attention", "full_attention"] * 12,
         "rope_parameters": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0,
                             "beta_slow": 1.0, "truncate": False, "rope_theta": 150000.0,
                             "original_max_position_embeddings": 4096}},
    ),
    "smallthinker-4b-a0.6b": (
        "smallthinker", 1536, 32, 12, 2, 768, 151936,
        {"moe_ffn_hidden_size": 768, "moe_num_primary_experts": 32,
         "moe_num_active_primary_experts": 4, "head_dim": 128, "rope_theta": 1.5e6},
    ),
    "smallthinker-21b-a3b": (
        "smallthinker", 2560, 52, 28, 4, 768, 151936,
        {"moe_ffn_hidden_size": 768, "moe_num_primary_experts": 64,
         "moe_num_active_primary_experts": 6, "head_dim": 128, "rope_theta": 1.5e6,
         "moe_primary_router_apply_softmax": True, "sliding_window_size": 4096,
         "rope_layout": [0, 1, 1, 1] * 13, "sliding_window_layout": [0, 1, 1, 1] * 13},
    ),
    "lfm2-8b-a1b": (
        "lfm2_moe", 2048, 24, 32, 8, 1792, 65536,
        {"intermediate_size": 7168, "num_dense_layers": 2, "num_experts": 32,
         "num_experts_per_tok": 4, "rope_theta": 1e6,
         "layer_types": ["full_attention" if n in (2, 6, 10, 14, 18, 21) else "conv"
                         for n in range(24)]},
    ),
    "qwen3.5-35b-a3b": (
        "qwen3_5_moe_text", 2048, 40, 16, 2, 512, 248320,
        {"num_experts": 256, "num_experts_per_tok": 8, "shared_expert_intermediate_size": 512,
         "head_dim": 256, "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    ),
}  # fmt: skip
NAMES = (*OPT, *GATED, *PLAIN, *MIXTURES)


def opt_config(
    hidden_size: int,
    layers: int,
    heads: int,
    ffn_dim: int,
    vocab_size: int = 50272,
    positions: int = 2048,
) -> JsonObject:
    """The Hugging Face config of an OPT of this shape."""
    return {
        "model_type": "opt", "hidden_size": hidden_size, "word_embed_proj_dim": hidden_size,
        "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": ffn_dim,
        "vocab_size": vocab_size, "max_position_embeddings": positions,
        "activation_function": "relu", "do_layer_norm_before": True, "enable_bias": True,
        "layer_norm_elementwise_affine": True, "tie_word_embeddings": True,
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip


def config_like(name: str, positions: int = 2048) -> JsonObject:
    """The Hugging Face config of a published shape. Raises UserError where ``name`` is unknown."""
    if name in OPT:
        return opt_config(*OPT[name], positions=positions)
    if name not in NAMES:
        raise UserError(f"{name!r} is not one of {', '.join(NAMES)}")
    shape = GATED.get(name) or PLAIN.get(name) or MIXTURES[name]
    model_type, hidden_size, layers, heads, key_values, neurons, vocabulary, other = shape
    return {
        "model_type": model_type, "hidden_size": hidden_size, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_values,
        "intermediate_size": neurons, "ffn_hidden_size": neurons,
        "moe_intermediate_size": neurons, "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "hidden_act": "silu" if name in MIXTURES else "relu",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, **other,
    }  # fmt: skip
