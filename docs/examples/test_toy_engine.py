"""An engine checked in CI: `pytest docs/examples/test_toy_engine.py`.

The engine is a Llama in NumPy, in the test itself; yours writes its values from wherever it runs.
The fixtures come with flashinfer, which pytest finds by itself.
"""

import json
from pathlib import Path

import numpy as np
import pytest

load_file = pytest.importorskip("safetensors.numpy").load_file

MODEL = Path(__file__).parents[2] / "tests" / "data" / "llama-silu"  # a checkpoint's directory
TOKENS = [17, 5, 80, 41, 3, 66, 29, 52]


def toy_engine(folder, tokens, epsilon=1e-6):
    """Run a Llama; returns {name of a module: what it gives}."""
    w = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    n, values = len(tokens), {}
    h = values["model.layers.0.input"] = w["model.embed_tokens.weight"][tokens]

    def norm(x, name):
        scale = 1 / np.sqrt((x * x).mean(axis=1, keepdims=True) + np.float32(epsilon))
        values[name] = x * scale * w[f"{name}.weight"]
        return values[name]

    def linear(x, name):
        values[name] = x @ w[f"{name}.weight"].T
        return values[name]

    def turned(x, count):
        x = x.reshape(n, count, -1)
        half = x.shape[2] // 2
        angles = np.arange(n)[:, None] * 10000.0 ** (-np.arange(half) / half)
        cos, sin = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        x = norm(h, f"{layer}.input_layernorm")
        q = turned(linear(x, f"{layer}.self_attn.q_proj"), heads)
        k = turned(linear(x, f"{layer}.self_attn.k_proj"), kv_heads)
        v = linear(x, f"{layer}.self_attn.v_proj").reshape(n, kv_heads, -1)
        k, v = (t.repeat(heads // kv_heads, axis=1) for t in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) * np.float32(q.shape[2] ** -0.5)
        scores[:, ~np.tri(n, dtype=bool)] = -np.inf
        p = np.exp(scores - scores.max(axis=2, keepdims=True))
        p /= p.sum(axis=2, keepdims=True)
        heads_out = np.einsum("hqk,khd->qhd", p, v).reshape(n, -1)
        h = h + linear(heads_out, f"{layer}.self_attn.o_proj")
        x = norm(h, f"{layer}.post_attention_layernorm")
        gate = linear(x, f"{layer}.mlp.gate_proj")
        a = gate / (1 + np.exp(-gate)) * linear(x, f"{layer}.mlp.up_proj")
        h = values[layer] = h + linear(a, f"{layer}.mlp.down_proj")
    values["logits"] = norm(h, "model.norm") @ w["lm_head.weight"].T
    return values


def test_the_engine_conforms(oracle, assert_conforms):
    trace = oracle(MODEL).write(toy_engine(MODEL, TOKENS), TOKENS, "the toy engine")
    assert_conforms(trace, MODEL)


def test_a_wrong_epsilon_is_named(oracle):
    model = oracle(MODEL)
    trace = model.write(toy_engine(MODEL, TOKENS, epsilon=1e-5), TOKENS)
    assert model.conforms(trace).first.name == "model.layers.0.input_layernorm"


def test_values_are_near_ours(oracle):
    theirs = toy_engine(MODEL, TOKENS)
    ours = oracle(MODEL).values(TOKENS, only=["logits"])
    assert np.abs(ours["logits"] - theirs["logits"]).max() < 1e-4


def test_llama_cpp_conforms(assert_conforms, tmp_path):
    """The same for llama.cpp, which runs a GGUF file of the model."""
    pytest.importorskip("llama_cpp")
    make_gguf = pytest.importorskip("make_gguf")
    pytest.importorskip("gguf")
    from flashinfer.oracle.from_llama_cpp import trace_llama_cpp

    def vocabulary(writer):
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(96)

    gguf = make_gguf.write_gguf(MODEL, tmp_path / "llama.gguf", metadata=vocabulary)
    trace_llama_cpp(gguf, TOKENS, tmp_path / "theirs.safetensors")
    assert_conforms(tmp_path / "theirs.safetensors", gguf)
