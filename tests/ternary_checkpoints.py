"""Random checkpoints of BitNets in each form that their linear layers are stored in."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# {form: (the fields of quantization_config, whether matrices are packed)}
FORMS = {
    "packed": ({"linear_class": "autobitlinear", "quantization_mode": "offline"}, True),
    "unpacked": ({"linear_class": "autobitlinear", "modules_to_not_convert": ["lm_head"]}, False),
    "divided": ({}, True),
    "online": ({"linear_class": "autobitlinear", "quantization_mode": "online"}, False),
}
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


def config_of(form, kind="bitnet", hidden_size=256, neurons=512, biases=False, activation=None):
    """config.json of a model of two layers; biases: of its attention; activation: None for the one
    that models of its kind have."""
    return {
        "model_type": kind, "architectures": ["BitNetForCausalLM" if kind == "bitnet" else
                                              "LlamaForCausalLM"],
        "vocab_size": 96, "hidden_size": hidden_size, "intermediate_size": neurons,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_act": activation or ("relu2" if kind == "bitnet" else "silu"),
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "attention_bias": biases, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "dtype": "float32",
        "quantization_config": {"quant_method": "bitnet", **FORMS[form][0]},
    }  # fmt: skip


def packed(ternary):
    """-1, 0 and 1 (4 m, columns) -> (m, columns) uint8, by the definition: the weight of row
    i + q m is in bits 2 q and 2 q + 1 of byte i."""
    m = len(ternary) // 4
    out = np.zeros((m, ternary.shape[1]), dtype=np.uint8)
    for row, weights in enumerate(ternary):
        out[row % m] |= (weights + 1).astype(np.uint8) << 2 * (row // m)
    return out


def tensors_of(config, form, seed=0):
    """({name: what the checkpoint stores}, {name: the weights that it stands for})."""
    random, (_, is_packed) = np.random.default_rng(seed), FORMS[form]
    d, n, heads = (config[f] for f in ("hidden_size", "intermediate_size", "num_attention_heads"))
    keys = d // heads * config["num_key_value_heads"]
    shapes = dict(zip(PROJECTIONS, ((d, d), (keys, d), (keys, d), (d, d), (n, d), (n, d), (d, n)),
                      strict=True))  # fmt: skip
    stored, weights = {}, {}
    for end in ("model.embed_tokens", "lm_head"):  # values that float16 holds
        table = random.standard_normal((config["vocab_size"], d)).astype(np.float16)
        stored[f"{end}.weight"] = table.astype(np.float32)
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    if config["model_type"] == "bitnet":
        norms |= {"self_attn.attn_sub_norm": d, "mlp.ffn_sub_norm": n}
    for layer in (f"model.layers.{i}" for i in range(config["num_hidden_layers"])):
        for name, size in norms.items():
            stored[f"{layer}.{name}.weight"] = random.uniform(0.5, 1.5, size).astype(np.float32)
        for name, shape in shapes.items():
            block = "mlp" if name in ("gate", "up", "down") else "self_attn"
            full = f"{layer}.{block}.{name}_proj.weight"
            stored |= _linear(full, shape, form, is_packed, random, weights)
            if block == "self_attn" and config["attention_bias"]:
                bias, scale = f"{full.removesuffix('.weight')}.bias", stored.get(f"{full}_scale")
                stored[bias] = random.standard_normal(shape[0]).astype(np.float32)
                scaled = FORMS[form][0].get("linear_class") and form != "online"
                weights[bias] = stored[bias] * scale if scaled else stored[bias]
    stored["model.norm.weight"] = random.uniform(0.5, 1.5, d).astype(np.float32)
    return stored, weights | {n: v for n, v in stored.items() if ".layers." not in n}


def _linear(name, shape, form, is_packed, random, weights):
    """One linear layer as it is stored; what it stands for goes to ``weights``."""
    if form == "online":
        values = random.standard_normal(shape).astype(np.float32) * np.float32(0.03)
        scale = np.float32(1) / np.float32(np.abs(values).mean(dtype=np.float64))
        weights[name] = np.clip(np.rint(values * scale), -1, 1) / scale
        return {name: values}
    ternary = random.integers(-1, 2, shape).astype(np.float32)
    about = 2**-2 if form == "divided" else 2**-13
    scale = np.float32(random.integers(128, 256) * about)  # as bfloat16 holds it
    weights[name] = ternary / scale if form == "divided" else ternary * scale
    held = packed(ternary) if is_packed else ternary
    return {name: held, f"{name}_scale": np.array([scale])}


def write(folder, config, stored):
    """Write config.json and model.safetensors; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def make(folder, form, kind="bitnet", seed=0, **sizes):
    """Write a random checkpoint; returns (its folder, {name: its weights})."""
    config = config_of(form, kind, **sizes)
    stored, weights = tensors_of(config, form, seed)
    return write(folder, config, stored), weights
