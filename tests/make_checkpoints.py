"""Write the small random checkpoints in tests/data, with the logits that transformers gives them.

    python tests/make_checkpoints.py

Needs the ``parity`` extra. Every option that real OPT checkpoints use is in one of them.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM

DATA = Path(__file__).parent / "data"
COMMON = {
    "vocab_size": 96,
    "hidden_size": 40,  # no multiple of a vector
    "num_hidden_layers": 2,
    "ffn_dim": 72,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "word_embed_proj_dim": 40,
    "init_std": 0.3,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "dropout": 0.0,
}
VARIANTS = {
    "opt-plain": {},
    "opt-untied": {"tie_word_embeddings": False},
    "opt-post-norm-projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    "opt-no-bias": {"enable_bias": False},
    "opt-no-affine": {"layer_norm_elementwise_affine": False},
    "opt-no-final-norm": {"_remove_final_layer_norm": True},
}
# name: (options, keyword arguments of save_pretrained)
FORMS = {
    "opt-sharded": ({}, {"max_shard_size": "20KB"}),
    "opt-bf16": ({"dtype": "bfloat16"}, {}),
}


def make(options, seed):
    """A model with random weights everywhere, norms and biases too."""
    torch.manual_seed(seed)
    options = {**COMMON, **options}
    dtype = getattr(torch, options.pop("dtype", "float32"))
    model = OPTForCausalLM(OPTConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


@torch.no_grad()
def reference(model, ids):
    """Logits (T, vocab_size) in float32 arithmetic."""
    return model.float()(torch.tensor(ids)[None]).logits[0].numpy()


def main():
    for seed, (name, (options, saving)) in enumerate(
        {**{name: (options, {}) for name, options in VARIANTS.items()}, **FORMS}.items()
    ):
        folder = DATA / name
        shutil.rmtree(folder, ignore_errors=True)
        model = make(options, seed)
        model.save_pretrained(folder, **saving)
        ids = np.random.default_rng(seed).integers(3, COMMON["vocab_size"], 40)
        np.savez(folder / "logits.npz", ids=ids, logits=reference(model, ids))
    folder = DATA / "opt-bin"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DATA / "opt-plain", folder)
    (folder / "model.safetensors").unlink()
    model = make({}, 0)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


if __name__ == "__main__":
    main()
