"""Tokens/s of a prompt, all weights in memory: ours beside llama.cpp, in turn.

    python -m bench.prompts [--dir DIR] [--formats f16,q8_0,q4_0] [--prompt N] [--json FILE]

Needs llama-cpp-python and gguf; skips with a message without them. Both engines hold the random
model of bench.llama_cpp, each in a process of its own, and take the same prompt by turns, so that
whatever else the machine does meets both. With ``--cpu-time`` it counts the CPU seconds of one
thread, which other programs disturb least; FLASHINFER_VECTOR_UNIT forces our vector unit.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from bench.limits import machine
from bench.llama_cpp import FFN, HEADS, KV_HEADS, LAYERS, WIDTH, write_gguf
from flashinfer import kernels
from flashinfer.cli.common import add_json, write_json
from flashinfer.formats.convert import convert
from flashinfer.plan.threads import default_threads

LLAMA_CPP = """
from llama_cpp import Llama
model = Llama({path!r}, n_ctx={n} + 8, n_threads={threads}, n_threads_batch={threads}, n_batch={n},
              n_ubatch={n}, verbose=False, use_mmap=False)
prompt = model.eval
"""
OURS = """
from flashinfer import Model
model = Model.open({path!r}, neurons="dense", threads={threads}, context={n} + 8)
prompt = model.forward
"""
TURNS = """
import sys, time
ids = [5 + 7 * i for i in range({n})]
prompt(ids)
print("ready", flush=True)
for _ in sys.stdin:
    model.reset()
    begun = time.{clock}()
    prompt(ids)
    print(time.{clock}() - begun, flush=True)
"""


class Engine:
    """An engine with its model, in a process that takes the prompt each time it is asked to."""

    def __init__(self, code, path, n, threads, clock):
        code = (code + TURNS).format(path=str(path), n=n, threads=threads, clock=clock)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.n, self.speeds = n, []
        self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"an engine ended with {self.process.wait()}")
        return line

    def turn(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.speeds.append(self.n / float(self.answer()))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def flops_per_token():
    """Of the layers' products with weights; attention's come on top, and the head is used once."""
    narrow = WIDTH // HEADS * KV_HEADS
    return 2 * LAYERS * (2 * WIDTH * WIDTH + 2 * narrow * WIDTH + 3 * FFN * WIDTH)


def measure(args):
    threads, clock = args.threads, "perf_counter"
    if args.cpu_time:
        threads, clock = 1, "process_time"
    rows = []
    for name in tqdm(args.formats.split(","), desc="formats", leave=False):
        theirs, same = (args.dir / f"bench-prompts-{name}{end}" for end in (".gguf", ".flash"))
        engines = {}
        try:
            write_gguf(theirs, name)
            convert(theirs, same)
            for engine, code, path in (("llama.cpp", LLAMA_CPP, theirs), ("ours", OURS, same)):
                engines[engine] = Engine(code, path, args.prompt, threads, clock)
            for _ in range(args.rounds):
                for engine in engines.values():
                    engine.turn()
        finally:
            for engine in engines.values():
                engine.close()
            for path in (theirs, same):
                path.unlink(missing_ok=True)
        speeds = {engine: statistics.median(e.speeds) for engine, e in engines.items()}
        rows.append({"format": name, **speeds, "ratio": speeds["ours"] / speeds["llama.cpp"]})
    return {
        "machine": machine(), "kernels": kernels.describe(), "threads": threads,
        "prompt": args.prompt, "clock": clock, "rows": rows,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default=".", type=Path, help="room for two models of 2.2 GB")
    parser.add_argument("--formats", default="f16,q8_0,q4_0")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=default_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of one thread")
    add_json(parser)
    args = parser.parse_args()
    try:
        import gguf
        import llama_cpp
    except ImportError as error:
        raise SystemExit(f"skipped: {error}; pip install llama-cpp-python gguf") from None
    figures = measure(args)
    figures["llama_cpp"] = llama_cpp.__version__
    del gguf
    print(f"{figures['machine']}, {figures['kernels']}, threads: {figures['threads']}, "
          f"llama-cpp-python {figures['llama_cpp']}; medians of {args.rounds}, by "
          f"{figures['clock']}\n")  # fmt: skip
    print(f"| format | llama.cpp, tokens/s of {args.prompt} | ours | ratio | ours, GFLOP/s |")
    print("|---|---|---|---|---|")
    for row in figures["rows"]:
        gflops = row["ours"] * flops_per_token() / 1e9
        print(f"| {row['format']} | {row['llama.cpp']:.1f} | {row['ours']:.1f} | "
              f"{row['ratio']:.2f} | {gflops:.0f} |")  # fmt: skip
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
