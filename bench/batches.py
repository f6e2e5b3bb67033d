"""Many texts that share each pass: tokens a second and bytes a token by how many there are.

    python -m bench.batches [--dir DIR] [--only llama,opt,olmoe] [--quick] [--json FILE]

As root, with cgroups; each run in a memory cgroup of its own:

llama  a Llama of 1.1 B parameters with random weights, all neurons used, in half of its size; and
       llama.cpp with the very same weights, memory-mapped, in the same cgroup, decoding as many
       sequences in parallel (skipped where llama-cpp-python or gguf is missing);
opt    OPT-1.3B's shape in half of its size, with predicted neurons;
olmoe  OLMoE's shape in a quarter of its size.

The texts have random prompts that share nothing, which is the hardest case for neurons and experts:
their union grows fastest.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from bench import llama_cpp
from bench.cgroup import NoCgroups, run_limited
from bench.limits import machine
from bench.models import synthetic_model
from bench.speculation import measured_profile
from flashinfer import Model
from flashinfer.cli.common import add_json, write_json
from flashinfer.formats.convert import convert
from flashinfer.plan.profile import load
from flashinfer.plan.threads import default_threads

TEXTS = (1, 2, 4, 8, 16, 32)
PROMPT = 4
CONTEXT = 64

LLAMA = """
import sys, time
import llama_cpp.llama_cpp as llama
path, texts, tokens, threads = sys.argv[1], *map(int, sys.argv[2:])
llama.llama_backend_init()
parameters = llama.llama_model_default_params()
parameters.use_extra_bufts = False
model = llama.llama_model_load_from_file(path.encode(), parameters)
settings = llama.llama_context_default_params()
settings.n_ctx, settings.n_seq_max, settings.n_batch = 64 * texts, texts, 512
settings.n_threads = settings.n_threads_batch = threads
context = llama.llama_init_from_model(model, settings)
batch = llama.llama_batch_init(texts, 0, 1)
begun = time.perf_counter()
for step in range(1 + tokens):
    if step == 1:
        begun = time.perf_counter()
    batch.n_tokens = texts
    for i in range(texts):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = 100 + 7 * i + 31 * step, step, 1
        batch.seq_id[i][0], batch.logits[i] = i, 1
    assert llama.llama_decode(context, batch) == 0
print(texts * tokens / (time.perf_counter() - begun))
"""


def ours(path, memory, device, mode, texts, tokens):
    """In a process of its own: figures of so many texts, printed as JSON."""
    draw, options = random.Random(texts), {} if mode is None else {"neurons": mode}
    with Model.open(
        path, memory=memory, context=CONTEXT, texts=texts, device=load(device), draft="off",
        **options,
    ) as model:  # fmt: skip
        prompts = [[draw.randrange(5, 30000) for _ in range(PROMPT)] for _ in range(texts)]
        for _ in model.generate_many(prompts, 2, 0, stop_at_eos=False):  # the caches are warm then
            pass
        for _ in model.generate_many(prompts, tokens, 0, stop_at_eos=False):
            pass
        phase, passes = model.stats.generation, model.stats.drafts.passes
        figures = {
            "tokens_per_second": phase.tokens_per_second,
            "flash_bytes_per_token": phase.bytes_per_token,
            "units_per_pass": (phase.hits + phase.misses) / passes,
            "hit_rate": phase.hit_rate,
            "pass_seconds": phase.seconds / passes,
            "expected_pass_seconds": model.pace.times.expected(texts),
        }
    print(json.dumps(figures))


def limited(memory, path, *arguments):
    code = f"from bench.batches import ours; ours({str(path)!r}, {memory}, *{arguments!r})"
    run = run_limited([sys.executable, "-c", code], memory, None, path, capture_output=True,
                      text=True)  # fmt: skip
    if run.returncode:
        return {"failed": run.stderr.strip().splitlines()[-1] if run.stderr else run.returncode}
    return json.loads(run.stdout)


def cold():
    """Drop the page cache: what another process left there costs a cgroup nothing."""
    with suppress(OSError):
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")


def theirs(memory, path, texts, tokens):
    cold()
    command = [sys.executable, "-c", LLAMA, str(path), str(texts), str(tokens),
               str(default_threads())]  # fmt: skip
    run = run_limited(command, memory, None, path, capture_output=True, text=True)
    if run.returncode:
        return {"failed": "killed" if run.returncode == -9 else run.stderr.strip()[-200:]}
    return {"tokens_per_second": float(run.stdout.split()[-1])}


def measure(name, engines, args):
    """Rows of a model; engines: {name: a function (texts, tokens) -> figures}."""
    rows = []
    for texts in TEXTS[:: 2 if args.quick else 1]:
        for engine, run in engines.items():
            tokens = 4 if args.quick else max(4, 32 // texts)
            runs = [run(texts, tokens) for _ in range(1 if args.quick else 3)]
            failed = next((r["failed"] for r in runs if "failed" in r), None)
            row = {"model": name, "engine": engine, "texts": texts, "failed": failed}
            if failed is None:
                row |= {key: statistics.median(r[key] for r in runs) for key in runs[0]}
            rows.append(row)
            print_row(row, rows)
    return rows


def print_row(row, rows):
    if row["failed"]:
        print(
            f"| {row['model']} | {row['engine']} | {row['texts']} | {row['failed']} |", flush=True
        )
        return
    one = next(r for r in rows if r["engine"] == row["engine"])
    cells = [row["model"], row["engine"], row["texts"], f"{row['tokens_per_second']:.2f}",
             f"{row['tokens_per_second'] / one.get('tokens_per_second', 0):.2f}"]  # fmt: skip
    if "pass_seconds" in row:
        cells += [f"{row['flash_bytes_per_token'] / 1e6:.1f} MB", f"{row['units_per_pass']:,.0f}",
                  f"{100 * row['hit_rate']:.0f} %", f"{1e3 * row['pass_seconds']:.0f} ms",
                  f"{1e3 * row['expected_pass_seconds']:.0f} ms"]  # fmt: skip
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def llama(args, device):
    """A dense Llama, and llama.cpp with the same weights."""
    gguf, path = args.dir / "bench-batches.gguf", args.dir / "bench-batches.flash"
    try:
        llama_cpp.write_gguf(gguf, "f16")
        convert(gguf, path)
        memory = path.stat().st_size // 8192 * 4096
        engines = {
            "ours": lambda texts, tokens: limited(
                memory, path, str(device), "dense", texts, tokens
            ),
            "llama.cpp": lambda texts, tokens: theirs(memory, gguf, texts, tokens),
        }
        return measure("llama 1.1 B, dense, half", engines, args)
    finally:
        gguf.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def synthetic(args, device, like, mode, share, name):
    path = args.dir / f"bench-{like}-f16.flash"
    with synthetic_model(path, like, keep=args.keep):
        memory = int(path.stat().st_size * share) // 4096 * 4096
        run = lambda texts, tokens: limited(memory, path, str(device), mode, texts, tokens)  # noqa: E731
        return measure(name, {"ours": run}, args)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default=".", type=Path, help="where models are made")
    parser.add_argument("--only", default="llama,opt,olmoe")
    parser.add_argument("--keep", action="store_true", help="leave the models there")
    parser.add_argument("--quick", action="store_true", help="fewer texts and tokens, and once")
    add_json(parser)
    args = parser.parse_args()
    parts, rows = args.only.split(","), []
    print(f"{machine()}; medians\n\n| model | engine | texts | tokens/s | of one text | read per "
          "token | units used in a pass | in DRAM | a pass | expected |\n"
          "|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            device = measured_profile(Path(folder))
            if "llama" in parts:
                try:
                    rows += llama(args, device)
                except ImportError as error:
                    print(f"skipped: {error}; pip install llama-cpp-python gguf")
            if "opt" in parts:
                rows += synthetic(args, device, "opt-1.3b", None, 0.5, "OPT-1.3B, predicted, half")
            if "olmoe" in parts:
                rows += synthetic(args, device, "olmoe-1b-7b", None, 0.25, "OLMoE, quarter")
    except NoCgroups as error:
        raise SystemExit(f"skipped: {error}") from None
    write_json(args.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
