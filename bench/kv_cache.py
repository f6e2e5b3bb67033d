"""Keys and values: what attention windows save, and what each number format takes and costs.

python -m bench.kv_cache [--model MODEL.flash --text FILE] [--tokens N] [--json FILE]

The text is by default Python source that the demo model was not trained on.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from flashinfer import Model
from flashinfer.cli.common import add_json, positive, text_ids, write_json
from flashinfer.cli.run import demo_model
from flashinfer.formats.architectures import model_config
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.study.divergence import Comparison
from flashinfer.study.perplexity import LOGIT_ROWS, predictions
from flashinfer.text.own_texts import stdlib_files
from flashinfer.text.tokenizer import Tokenizer
from flashinfer.transformer.kv_cache import KV_DTYPES, kept_tokens, token_bytes

MODELS = {  # as published: layers, key/value heads, head_dim, and what says which layers see little
    "Mistral 7B v0.1": ("mistral", 32, 8, 128, {"sliding_window": 4096}),
    "Gemma 2 9B": ("gemma2", 42, 8, 256, {"sliding_window": 4096}),
    "Gemma 3 4B": ("gemma3_text", 34, 4, 256, {"sliding_window": 1024}),
    "GPT-OSS 20B": ("gpt_oss", 24, 8, 64, {"sliding_window": 128}),
}
CONTEXTS = (4096, 32768)


def windows():
    """Of models with attention windows: bytes of all tokens' keys and values and of those kept."""
    rows = []
    for name, (kind, layers, heads, head_dim, more) in MODELS.items():
        config = model_config({
            "model_type": kind, "num_hidden_layers": layers, "num_key_value_heads": heads,
            "num_attention_heads": 2 * heads, "head_dim": head_dim,
            "hidden_size": 2 * heads * head_dim, "max_position_embeddings": max(CONTEXTS), **more,
        })  # fmt: skip
        attentions = [k.attention for k in config.layers if k.mixer.memory_of is None]
        for context in CONTEXTS:
            kept = [kept_tokens(sizes, context) for sizes in attentions]
            row = {"model": name, "context": context}
            for dtype in KV_DTYPES:
                each = [2 * token_bytes(sizes, dtype) for sizes in attentions]
                row[dtype] = np.dot(each, kept).item()
                if dtype == "f16":
                    row["every"] = sum(each) * context
            rows.append(row)
    return rows


def formats(path, text, tokens):
    """Of one model, with all neurons: how far each number format is from float32 keys."""
    with Bundle(path) as bundle:
        attentions = [k.attention for k in bundle.config.layers if k.mixer.memory_of is None]
        ids = text_ids(text, Tokenizer(bundle), tokens)
    each = {name: 2 * sum(token_bytes(one, name) for one in attentions) for name in KV_DTYPES}
    compared, largest = {name: Comparison() for name in KV_DTYPES}, dict.fromkeys(KV_DTYPES, 0.0)
    with ExitStack() as stack:
        models = [
            stack.enter_context(
                Model.open(path, neurons="dense", kv_dtype=name, logit_rows=LOGIT_ROWS)
            )
            for name in KV_DTYPES
        ]
        for base, *others in zip(*(predictions(model, ids) for model in models), strict=True):
            for name, found in zip(KV_DTYPES, (base, *others), strict=True):
                off = float(np.abs(found.logits - base.logits).max())
                largest[name] = max(largest[name], off)
                for rows in zip(base.logits, found.logits, base.following, strict=True):
                    compared[name].add(*rows)
    return [
        {
            "kv_dtype": name, "token_bytes": each[name], "largest": largest[name],
            "perplexity": compared[name].model.perplexity, "tokens": len(compared[name].nats),
            **vars(compared[name].distance()),
        }
        for name in KV_DTYPES
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=demo_model())
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=positive, default=8192)
    add_json(parser)
    args = parser.parse_args()
    of_windows = windows()
    print("| model | context | all tokens, f16 | kept, f32 | kept, f16 | kept, q8_0 |")
    print("|---|---|---|---|---|---|")
    for row in of_windows:
        sizes = (f"{row[key] / 2**20:,.0f} MiB" for key in ("every", *KV_DTYPES))
        print(f"| {row['model']} | {row['context']:,} | {' | '.join(sizes)} |")
    with tempfile.TemporaryDirectory() as folder:
        text = args.text or Path(folder) / "held_out.txt"
        if args.text is None:
            text.write_text("\n".join(stdlib_files()[1]))
        of_formats = formats(args.model, text, args.tokens)
    print(f"\n{args.model}, {of_formats[0]['tokens']:,} tokens predicted, all neurons:")
    print(
        "| keys and values | bytes a token | largest difference of a logit | perplexity "
        "| KL from f32, mean | same likeliest token |\n|---|---|---|---|---|---|"
    )
    for row in of_formats:
        print(
            f"| {row['kv_dtype']} | {row['token_bytes']:,} | {row['largest']:.2g} "
            f"| {row['perplexity']:.4f} | {row['kl_mean']:.2g} | {100 * row['same_top']:.2f} % |"
        )
    write_json(args.json, {"windows": of_windows, "formats": of_formats})


if __name__ == "__main__":
    main()
