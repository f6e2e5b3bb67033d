"""Keys and values of models with attention windows: what is kept, beside those of all tokens.

python -m bench.kv_cache [--json FILE]
"""

import argparse

import numpy as np

from flashinfer.cli.common import add_json, write_json
from flashinfer.formats.architectures import model_config
from flashinfer.transformer.kv_cache import kept_tokens, token_bytes

MODELS = {  # as published: layers, key/value heads, head_dim, and what says which layers see little
    "Mistral 7B v0.1": ("mistral", 32, 8, 128, {"sliding_window": 4096}),
    "Gemma 2 9B": ("gemma2", 42, 8, 256, {"sliding_window": 4096}),
    "Gemma 3 4B": ("gemma3_text", 34, 4, 256, {"sliding_window": 1024}),
    "GPT-OSS 20B": ("gpt_oss", 24, 8, 64, {"sliding_window": 128}),
}
CONTEXTS = (4096, 32768)
HALF = 2  # bytes of a float16


def measure():
    rows = []
    for name, (kind, layers, heads, head_dim, more) in MODELS.items():
        config = model_config({
            "model_type": kind, "num_hidden_layers": layers, "num_key_value_heads": heads,
            "num_attention_heads": 2 * heads, "head_dim": head_dim,
            "hidden_size": 2 * heads * head_dim, "max_position_embeddings": max(CONTEXTS), **more,
        })  # fmt: skip
        for context in CONTEXTS:
            attentions = [layer.attention for layer in config.layers]
            each = [2 * token_bytes(sizes, HALF) for sizes in attentions]
            kept = [kept_tokens(sizes, context) for sizes in attentions]
            nbytes, every = np.dot(each, kept).item(), sum(each) * context
            rows.append({"model": name, "context": context, "kept": nbytes, "every": every})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_json(parser)
    args = parser.parse_args()
    rows = measure()
    print(f"{'model':18} {'context':>8} {'all tokens':>12} {'kept':>12}")
    for row in rows:
        every, kept = (f"{row[key] / 2**20:,.0f} MiB" for key in ("every", "kept"))
        print(f"{row['model']:18} {row['context']:8,} {every:>12} {kept:>12}")
    write_json(args.json, {"kv_cache": rows})


if __name__ == "__main__":
    main()
