"""llama.cpp on a random model of 1.1 B parameters, to stand beside our figures.

    python -m bench.llama_cpp [--dir DIR] [--formats f16,q8_0,q4_0] [--dense] [--json FILE]

Needs llama-cpp-python and gguf (pip builds the former from llama.cpp's sources); skips with a
message without them. All in memory: tokens/s of decoding and of a prompt of 128 tokens, and the
bytes of weights per second that this means. Beside it ours, same threads, same machine, in turn:
with all neurons on the same file, converted; and predicted, on a synthetic model of the same shape
with a ReLU.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.limits import machine
from flashinfer import Model
from flashinfer.cli.common import add_json, write_json
from flashinfer.formats.convert import convert
from flashinfer.formats.number_formats import FORMATS
from flashinfer.plan.threads import default_threads
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import config_like

LAYERS, WIDTH, FFN, HEADS, KV_HEADS, VOCABULARY = 22, 2048, 5632, 32, 4, 32000
PROMPT, TOKENS, ROUNDS = 128, 48, 3


def write_gguf(path, name):
    """A llama of this shape with random weights."""
    import gguf

    random, format = np.random.default_rng(0), FORMATS[name]
    kind = gguf.GGMLQuantizationType[name.upper()]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")

    def matrix(tensor, rows, columns):
        some = random.standard_normal((64, columns), dtype=np.float32) / np.sqrt(columns)
        raw = np.resize(format.encode(some), (rows, format.row_bytes(columns)))
        if name == "f16":
            writer.add_tensor(tensor, raw.view(np.float16))
        else:
            writer.add_tensor(tensor, raw, raw_dtype=kind)

    matrix("token_embd.weight", VOCABULARY, WIDTH)
    matrix("output.weight", VOCABULARY, WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    narrow = WIDTH // HEADS * KV_HEADS
    for i in range(LAYERS):
        for part, rows, columns in (
            ("attn_q", WIDTH, WIDTH), ("attn_k", narrow, WIDTH), ("attn_v", narrow, WIDTH),
            ("attn_output", WIDTH, WIDTH), ("ffn_gate", FFN, WIDTH), ("ffn_up", FFN, WIDTH),
            ("ffn_down", WIDTH, FFN),
        ):  # fmt: skip
            matrix(f"blk.{i}.{part}.weight", rows, columns)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bytes_per_token(name):
    """Weights that llama.cpp reads for a token: all but the input embeddings."""
    narrow = WIDTH // HEADS * KV_HEADS
    layer = 2 * WIDTH * WIDTH + 2 * narrow * WIDTH + 3 * FFN * WIDTH
    format = FORMATS[name]
    return (LAYERS * layer + VOCABULARY * WIDTH) * format.block_bytes / format.block


def run_llama_cpp(path, threads):
    """In a process of its own: (tokens/s of decoding, of the prompt)."""
    code = f"""
import time
from llama_cpp import Llama
model = Llama({str(path)!r}, n_ctx=256, n_threads={threads}, n_threads_batch={threads},
              n_batch={PROMPT}, verbose=False, use_mmap=False)
model.eval([5 + 7 * i for i in range(8)])
model.reset()
begun = time.perf_counter()
model.eval([5 + 7 * i for i in range({PROMPT})])
prompt = {PROMPT} / (time.perf_counter() - begun)
begun = time.perf_counter()
for i in range({TOKENS}):
    model.eval([11 + i])
print({TOKENS} / (time.perf_counter() - begun), prompt)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return tuple(map(float, run.stdout.split()[-2:]))


def run_ours(path, threads, neurons):
    """(tokens/s of decoding, of the prompt)."""
    with Model.open(path, neurons=neurons, threads=threads, context=256) as model:
        model.forward([5 + 7 * i for i in range(8)])
        model.reset()
        begun = time.perf_counter()
        model.forward([5 + 7 * i for i in range(PROMPT)])
        prompt = PROMPT / (time.perf_counter() - begun)
        begun = time.perf_counter()
        for i in range(TOKENS):
            model.forward([11 + i])
        return TOKENS / (time.perf_counter() - begun), prompt


def our_bytes_per_token(path):
    """Weights that our dense mode reads for a token."""
    with Model.open(path, neurons="dense", context=16) as model:
        roles = ("attention", "head", "ffn")
        return sum(
            model.bundle.tensors[spec.name].nbytes
            for spec in model.bundle.specs
            if spec.role in roles
        )


def measure(directory, formats, threads, predicted):
    rows = []
    for name in tqdm(formats, desc="formats", leave=False):
        theirs = directory / f"bench-llama-{name}.gguf"
        same, sparse = (directory / f"bench-{kind}-{name}.flash" for kind in ("llama", "relu"))
        try:
            write_gguf(theirs, name)
            convert(theirs, same)
            runs = {"llama.cpp": [], "ours, dense": []}
            if predicted:
                synthesize(sparse, config_like("tinyllama-1.1b"), name)
                runs["ours, predicted"] = []
            for _ in range(ROUNDS):
                runs["llama.cpp"].append(run_llama_cpp(theirs, threads))
                runs["ours, dense"].append(run_ours(same, threads, "dense"))
                if predicted:
                    runs["ours, predicted"].append(run_ours(sparse, threads, "predicted"))
            dense_bytes = our_bytes_per_token(same)
        finally:
            for path in (theirs, same, sparse):
                path.unlink(missing_ok=True)
        sizes = {"llama.cpp": bytes_per_token(name), "ours, dense": dense_bytes}
        for engine, found in runs.items():
            decode, prompt = (statistics.median(values) for values in zip(*found, strict=True))
            size = sizes.get(engine)
            rows.append(
                {"format": name, "engine": engine, "tokens_per_second": decode,
                 "prompt_tokens_per_second": prompt,
                 "bytes_per_second": size and decode * size}
            )  # fmt: skip
    return {"machine": machine(), "threads": threads, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default=".", type=Path, help="room for three models of 2.2 GB")
    parser.add_argument("--formats", default="f16,q8_0,q4_0")
    parser.add_argument("--dense", action="store_true", help="without the predicted model")
    parser.add_argument("-t", "--threads", type=int, default=default_threads())
    add_json(parser)
    args = parser.parse_args()
    try:
        import gguf
        import llama_cpp
    except ImportError as error:
        raise SystemExit(f"skipped: {error}; pip install llama-cpp-python gguf") from None
    figures = measure(args.dir, args.formats.split(","), args.threads, not args.dense)
    figures["llama_cpp"] = llama_cpp.__version__
    del gguf
    print(f"{figures['machine']}, {figures['threads']} threads, llama-cpp-python "
          f"{figures['llama_cpp']}; medians of {ROUNDS}\n")  # fmt: skip
    print("| format | engine | tokens/s | weights read | prompt of 128, tokens/s |")
    print("|---|---|---|---|---|")
    for row in figures["rows"]:
        speed = row["bytes_per_second"]
        print(
            f"| {row['format']} | {row['engine']} | {row['tokens_per_second']:.1f} | "
            f"{f'{speed / 1e9:.1f} GB/s' if speed else ''} | "
            f"{row['prompt_tokens_per_second']:.0f} |"
        )
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
