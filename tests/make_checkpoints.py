"""Write the small random checkpoints in tests/data, with the logits that transformers gives them.

    python tests/make_checkpoints.py [NAME...]

Needs the ``parity`` extra. Every option that real checkpoints use is in one of them.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

DATA = Path(__file__).parent / "data"
TOKENS = 40  # of each text
COMMON = {
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
OPT = {
    **COMMON,
    "model_type": "opt",
    "hidden_size": 40,  # no multiple of a vector
    "ffn_dim": 72,
    "word_embed_proj_dim": 40,
    "init_std": 0.3,
    "dropout": 0.0,
}
LLAMA = {
    **COMMON,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def like(model_type, **options):
    return {**LLAMA, "model_type": model_type, **options}


def mixture(model_type, **options):
    return like(model_type, num_experts_per_tok=3, **options)


def rope(kind, **parameters):
    """The options of rotary positions of one kind."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **parameters}}


FALCON = {
    **COMMON,
    "model_type": "falcon",
    "hidden_size": 40,
    "ffn_hidden_size": 72,
    "initializer_range": 0.2,
}
VARIANTS = {
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
    "granitemoe": mixture("granitemoe", num_local_experts=8, intermediate_size=24,
                          embedding_multiplier=3.0, attention_multiplier=0.2,
                          residual_multiplier=0.5, logits_scaling=2.0),
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
}  # fmt: skip


# Models whose code comes with their checkpoints: what transformers has instead, and its FFN.
def double_relu(mlp, x):
    return mlp.down_proj(torch.relu(mlp.gate_proj(x)) * torch.relu(mlp.up_proj(x)))


def fat_relu(mlp, x):
    gate = mlp.gate_proj(x)
    return mlp.down_proj(torch.where(gate > 0.05, gate, 0) * mlp.up_proj(x))


PATCHED = {"bamboo": ("mistral", double_relu), "sparsellama": ("llama", fat_relu)}
# name: (options, dtype, keyword arguments of save_pretrained)
FORMS = {
    "opt-sharded": (OPT, "float32", {"max_shard_size": "20KB"}),
    "opt-bf16": (OPT, "bfloat16", {}),
}


def make(options, seed, dtype="float32"):
    """A model with random weights everywhere, norms and biases too."""
    torch.manual_seed(seed)
    options = {**options}
    model_type = options.pop("model_type")
    base, forward = PATCHED.get(model_type, (model_type, None))
    if forward:
        options["hidden_act"] = "relu"
    config = AutoConfig.for_model(base, **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers if forward else ():
        layer.mlp.forward = forward.__get__(layer.mlp)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
    return model.to(getattr(torch, dtype))


def save(model, folder, options, **saving):
    """As a checkpoint in Hugging Face's form."""
    model.save_pretrained(folder, **saving)
    if options["model_type"] in PATCHED:
        path = Path(folder) / "config.json"
        config = {**json.loads(path.read_text()), **options}
        path.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def reference(model, ids):
    """Logits (T, vocab_size) in float32 arithmetic."""
    return model.float()(torch.tensor(ids)[None]).logits[0].numpy()


def write(name, options, seed, dtype="float32", **saving):
    folder = DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    model = make(options, seed, dtype)
    save(model, folder, options, **saving)
    ids = np.random.default_rng(seed).integers(3, COMMON["vocab_size"], TOKENS)
    np.savez(folder / "logits.npz", ids=ids, logits=reference(model, ids))


def main(names):
    forms = {name: (options, "float32", {}) for name, options in VARIANTS.items()} | FORMS
    for seed, (name, (options, dtype, saving)) in enumerate(forms.items()):
        if not names or name in names:
            write(name, options, seed, dtype, **saving)
    if not names or "opt-bin" in names:
        folder = DATA / "opt-bin"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(DATA / "opt-plain", folder)
        (folder / "model.safetensors").unlink()
        torch.save(make(OPT, 0).state_dict(), folder / "pytorch_model.bin")


if __name__ == "__main__":
    main(sys.argv[1:])
