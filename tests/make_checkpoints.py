"""Write the small random checkpoints in tests/data and tests/encoders, with the logits that
transformers gives them.

    python tests/make_checkpoints.py [NAME...]

Needs the ``parity`` extra. Every option that real checkpoints use is in one of them.
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from smallthinker_model import SmallThinker
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
)

from flashinfer.oracle.kits.configs import COMMON, OPT
from flashinfer.oracle.kits.configs import CONFIGS as VARIANTS

DATA = Path(__file__).parent / "data"
ENCODER_DATA = Path(__file__).parent / "encoders"
TOKENS = 40  # of each text
# How large transformers makes its random weights; a model's own options go before these.
INITIAL = {"initializer_range": 0.2, "init_std": 0.3, "dropout": 0.0}


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


# Encoders: (options, the class of the model: without a head, with one of masked tokens, or two).
ENCODER = {
    **COMMON, "hidden_size": 64, "intermediate_size": 96, "type_vocab_size": 2, "pad_token_id": 0,
    "bos_token_id": 1,
}  # fmt: skip
ENCODERS = {
    "bert": ({**ENCODER, "model_type": "bert"}, AutoModel),
    "bert-masked": ({**ENCODER, "model_type": "bert", "hidden_act": "gelu_new"},
                    AutoModelForMaskedLM),
    "bert-pretraining": ({**ENCODER, "model_type": "bert", "hidden_act": "relu",
                          "type_vocab_size": 3}, AutoModelForPreTraining),
    "roberta": ({**ENCODER, "model_type": "roberta", "pad_token_id": 5}, AutoModelForMaskedLM),
    "roberta-untied": ({**ENCODER, "model_type": "roberta", "hidden_act": "relu",
                        "tie_word_embeddings": False}, AutoModelForMaskedLM),
    "xlm-roberta": ({**ENCODER, "model_type": "xlm-roberta"}, AutoModel),
}  # fmt: skip


def make(options, seed, dtype="float32", kind=AutoModelForCausalLM):
    """A model with random weights everywhere, norms and biases too; kind: its class."""
    torch.manual_seed(seed)
    options = copy.deepcopy({**INITIAL, **options})  # which the library changes
    model_type = options.pop("model_type")
    base, forward = PATCHED.get(model_type, (model_type, None))
    if forward:
        options["hidden_act"] = "relu"
    if model_type == "smallthinker":
        model = SmallThinker(options)
    else:
        config = AutoConfig.for_model(base, **options)
        model = kind.from_config(config, experts_implementation="eager").eval()
    for layer in model.model.layers if forward else ():
        layer.mlp.forward = forward.__get__(layer.mlp)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            # Of attention without a scale the norm of queries has it.
            if getattr(module, "scaling", None) == 1.0 and hasattr(module, "q_norm"):
                module.q_norm.weight.mul_(module.head_dim**-0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
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
    """Logits (T, vocab_size) in float32 arithmetic, or in float64 where float32 is not enough: a
    gated delta net brings even the shortest key to a length of 1."""
    model = model.double() if unsure(model) else model.float()
    return model(torch.tensor(ids)[None]).logits[0].float().numpy()


def unsure(model):
    """Whether the last digits of a model's float32 logits are not sure."""
    return getattr(model.config, "linear_num_key_heads", None) is not None


def allowed(model, logits):
    """How far off logits may be: where float32 is unsure, a ten thousandth of the largest."""
    return 1e-4 * max(1.0, np.abs(logits).max()) if unsure(model) else 1e-4


@torch.no_grad()
def encoded(model, ids):
    """{"hidden": (T, d_model)} of an encoder, and "pooled" and "logits" where it has them."""
    found, text = {}, torch.tensor(ids)[None]
    output = getattr(model, model.base_model_prefix, model)(text)
    found["hidden"] = output.last_hidden_state[0].numpy()
    if output.pooler_output is not None:
        found["pooled"] = output.pooler_output[0].numpy()
    if hasattr(model, model.base_model_prefix):
        output = model(text)
        logits = output.logits if hasattr(output, "logits") else output.prediction_logits
        found["logits"] = logits[0].numpy()
    return found


def write_encoder(name, options, kind, seed):
    folder = ENCODER_DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    model = make(options, seed, kind=kind)
    save(model, folder, options)
    ids = np.random.default_rng(seed).integers(0, COMMON["vocab_size"], TOKENS)
    np.savez(folder / "encoded.npz", ids=ids, **encoded(model, ids))


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
    for seed, (name, (options, kind)) in enumerate(ENCODERS.items()):
        if not names or name in names:
            write_encoder(name, options, kind, seed)
    if not names or "opt-bin" in names:
        folder = DATA / "opt-bin"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(DATA / "opt-plain", folder)
        (folder / "model.safetensors").unlink()
        torch.save(make(OPT, 0).state_dict(), folder / "pytorch_model.bin")


if __name__ == "__main__":
    main(sys.argv[1:])
