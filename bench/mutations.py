"""How good the oracle is: faults planted in foreign engines, one at a time, and found or not.

    python -m bench.mutations [--engine transformers|llama.cpp] [--clean N] [--only TEXT]

A fault is caught where the comparison with the sound model finds an operation that is wrong, and
located where the first one is the very operation that the fault was planted in. Clean runs of the
same engines, over architectures, number formats and texts, count false alarms; the last lines are
sound files that llama.cpp computes otherwise than the models' authors do. Needs transformers
and torch, llama-cpp-python and gguf; the engine that is missing is left out.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.limits import machine
from flashinfer.cli.common import add_json, write_json
from flashinfer.formats.errors import UserError
from flashinfer.oracle.arithmetic import KNOWN
from flashinfer.oracle.compare import compare
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.oracle.trace_file import Trace

TOKENS = 24  # of a text
DTYPES = ("float32", "bfloat16", "float16")  # of transformers' models
NO_MODEL = ("bamboo", "prosparse")  # whose code comes with their checkpoints


class Plant:
    """Sets attributes, and takes it back."""

    def __init__(self):
        self.before = []

    def __call__(self, owner, name, value):
        self.before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self):
        for owner, name, value in reversed(self.before):
            setattr(owner, name, value)


def text(vocabulary, seed, n=TOKENS):
    return np.random.default_rng(seed).integers(3, vocabulary, n).tolist()


def verdict(model, trace, arithmetic=None):
    """(the first wrong operation or None, its key, how far off it is; how far the worst is)."""
    with ModelWeights(model) as weights, Trace(trace) as other:
        found = compare(weights, other, KNOWN[arithmetic or other.arithmetic])
    first, worst = found.first, max(o.noise for o in found.operations)
    return (
        (None, None, 0.0, worst) if first is None else (first.name, first.key, first.noise, worst)
    )


def row(engine, name, model, expected, found):
    operation, key, noise, _ = found
    return {
        "engine": engine, "fault": name, "model": model, "caught": operation is not None,
        "located": key in expected, "first": operation, "noise": noise,
        "expected": sorted(expected),
    }  # fmt: skip


# ---------------------------------------------------------------------- transformers


def open_transformers(folder, dtype="float32"):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    ).eval()


def run_transformers(folder, model, ids, trace):
    import torch

    from flashinfer.formats.bounded_json import read_json
    from flashinfer.oracle.from_transformers import traced_transformers

    config = read_json(Path(folder) / "config.json")
    with torch.no_grad(), traced_transformers(model, ids, trace, config):
        model(torch.tensor([ids]), use_cache=False)


def faults_of_transformers(data, scratch, only):
    from bench.faults_transformers import FAULTS

    chosen = [fault for fault in FAULTS if only in fault[0]]
    for name, model_name, fault, expected in tqdm(chosen, desc="transformers", leave=False):
        model, plant = open_transformers(data / model_name), Plant()
        try:
            fault(model, plant)
            run_transformers(data / model_name, model, text(90, 1), scratch / "t.safetensors")
        finally:
            plant.undo()
        found = verdict(data / model_name, scratch / "t.safetensors")
        yield row("transformers", name, model_name, expected, found)


def clean_of_transformers(data, scratch, runs):
    folders = [p for p in sorted(data.iterdir()) if (p / "config.json").exists()]
    folders = [p for p in folders if p.name not in NO_MODEL]
    for number in tqdm(range(runs), desc="clean, transformers", leave=False):
        folder = folders[number % len(folders)]
        dtype = DTYPES[number // len(folders) % len(DTYPES)]
        model = open_transformers(folder, dtype)
        ids = text(90, 100 + number, min(TOKENS, model.config.max_position_embeddings))
        run_transformers(folder, model, ids, scratch / "t.safetensors")
        model.save_pretrained(scratch / "rounded")  # with weights of this dtype
        found = verdict(scratch / "rounded", scratch / "t.safetensors", dtype)
        yield "transformers", folder.name, dtype, found


# ---------------------------------------------------------------------- llama.cpp


def faults_of_llama_cpp(data, scratch, only):
    from bench.faults_llama_cpp import FAULTS, Gguf
    from flashinfer.oracle.from_llama_cpp import trace_llama_cpp

    chosen = [fault for fault in FAULTS if only in fault[0]]
    for name, model, format, change, expected in tqdm(chosen, desc="llama.cpp", leave=False):
        sound, wrong = scratch / "sound.gguf", scratch / "wrong.gguf"
        Gguf.of(data / model, format).write(sound)
        gguf = Gguf.of(data / model, format)
        options = change(gguf) or {}
        gguf.write(wrong)
        trace_llama_cpp(wrong, text(90, 1), scratch / "t.safetensors", **options)
        found = verdict(sound, scratch / "t.safetensors")
        yield row("llama.cpp", name, f"{model}, {format}", expected, found)


def clean_of_llama_cpp(data, scratch, runs):
    from bench.faults_llama_cpp import CLEAN

    yield from runs_of_llama_cpp(data, scratch, CLEAN, runs)


def differences_of_llama_cpp(data, scratch):
    """What llama.cpp computes otherwise than a model's authors do."""
    from bench.faults_llama_cpp import DIFFERENT

    yield from runs_of_llama_cpp(data, scratch, DIFFERENT, len(DIFFERENT))


def runs_of_llama_cpp(data, scratch, models, runs):
    from bench.faults_llama_cpp import Gguf
    from flashinfer.oracle.from_llama_cpp import trace_llama_cpp

    for number in tqdm(range(runs), desc="clean, llama.cpp", leave=False):
        model, format = models[number % len(models)]
        path = scratch / "sound.gguf"
        Gguf.of(data / model, format, number // len(models)).write(path)
        ids = text(90, 200 + number, 8 + 4 * (number % 10))
        trace_llama_cpp(path, ids, scratch / "t.safetensors")
        yield "llama.cpp", model, format, verdict(path, scratch / "t.safetensors")


ENGINES = {
    "transformers": (faults_of_transformers, clean_of_transformers, "transformers"),
    "llama.cpp": (faults_of_llama_cpp, clean_of_llama_cpp, "llama_cpp"),
}


def available(module):
    try:
        __import__(module)
    except ImportError:
        print(f"{module} is not installed; left out", file=sys.stderr)
        return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, action="append")
    parser.add_argument("--data", type=Path, default=Path("tests/data"))
    parser.add_argument("--clean", type=int, default=120, help="clean runs of each engine (120)")
    parser.add_argument("--only", default="", help="faults whose names hold this")
    add_json(parser)
    args = parser.parse_args()
    rows, clean, different = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for engine in args.engine or ENGINES:
            faults, sound, module = ENGINES[engine]
            if not available(module):
                continue
            rows += faults(args.data, Path(folder), args.only)
            clean += sound(args.data, Path(folder), args.clean)
            if engine == "llama.cpp":
                different += differences_of_llama_cpp(args.data, Path(folder))
    report(rows, clean, different)
    alarms = [run for run in clean if run[3][0] is not None]
    write_json(args.json, {
        "machine": machine(), "faults": rows, "clean_runs": len(clean), "false_alarms": len(alarms),
    })  # fmt: skip


def report(rows, clean, different):
    print(f"{machine()}\n\n| engine | fault | model | first wrong | noise | |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        said = "located" if r["located"] else "caught" if r["caught"] else "**missed**"
        first = r["first"] or ""
        print(
            f"| {r['engine']} | {r['fault']} | {r['model']} | {first} | {r['noise']:.3g} | {said} |"
        )
    counts = Counter((r["caught"], r["located"]) for r in rows)
    caught, located = sum(r["caught"] for r in rows), counts[True, True]
    print(f"\n{len(rows)} faults: {caught} caught, {located} located at the very operation")
    alarms = [run for run in clean if run[3][0] is not None]
    worst = max((run[3][3] for run in clean), default=0.0)
    print(
        f"{len(clean)} clean runs: {len(alarms)} false alarms; at most {worst:.2f} units of noise"
    )
    for engine, model, format, found in [*alarms, *different]:
        print(f"  {engine}, {model}, {format}: {found[0]}, {found[2]:.3g} units of noise")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
