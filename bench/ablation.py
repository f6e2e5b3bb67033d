"""The paper's ideas one by one, and then ours: what each is worth (its table 3, and beyond).

    python -m bench.ablation [--model x.flash] [--memory SIZE] [--json FILE] [--plot FILE]

Each step keeps what the steps before it brought. As root every step runs in a memory cgroup of
half the model's file, or of --memory. Makes a model of the shape of OPT-1.3B where none is given.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.cgroup import NoCgroups, run_limited
from bench.limits import machine
from bench.models import synthetic_model
from flashinfer import Model
from flashinfer.cli.common import add_json, size, write_json
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.paper.feedforward import FeedForward
from flashinfer.paper.flash import Flash
from flashinfer.paper.prefetch import NoPrefetch
from flashinfer.paper.unit_store import EVERY, UnitStore
from flashinfer.plan.memory import format_size, peak_rss
from flashinfer.plan.options import Options
from flashinfer.plan.setup import opened, prepare

STEPS = {  # name: what is on; a window of 0 forgets every token
    "everything read": {"neurons": "dense", "resident": False},
    "hybrid: attention stays": {"neurons": "dense"},
    "+ predictor": {"window": 0},
    "+ window of 5 tokens": {"window": 5},
    "+ bundling": {"window": 5, "bundled": True},
    "+ overlap": {"window": 5, "bundled": True, "overlap": True},
    "+ cache policy": {"bundled": True, "overlap": True},
    "+ prefetch": {"bundled": True, "overlap": True, "prefetched": True},
}
TOKENS = {"dense": 6, "predicted": 48}
PROMPT = [5 + 7 * i for i in range(64)]


def nothing_resident(plan):
    """Every tensor is read for every token."""
    none = (0,) * len(plan.slots)
    return replace(plan, attention_layers=0, attention=0, head=0, embeddings=0, slots=none, cache=0)


class TimedFlash(Flash):
    """Counts the seconds that it is waited for."""

    waited = 0.0

    def wait(self, submitted):
        begun = time.perf_counter()
        super().wait(submitted)
        self.waited += time.perf_counter() - begun


class Unbundled(UnitStore):
    """Reads the halves of a bundle as two, as where up and down are two matrices."""

    def submit(self, units, slots, urgent=True):
        if not len(units):
            return None
        offsets, lengths, _ = (part[:, 0] for part in self.spans(units))
        half = lengths // 2 // self.flash.alignment * self.flash.alignment
        to = slots * np.int64(self.cache.slot_bytes)
        return self.flash.submit(
            np.concatenate([offsets, offsets + half]),
            np.concatenate([half, lengths - half]),
            self.cache.memory,
            np.concatenate([to, to + half]),
            urgent,
        )


class OneByOne:
    """All reads first, then all products."""

    def arrivals(self, early, misses, begun, late, selection):
        self.wait(begun)
        self.wait(late)
        yield EVERY


class UnbundledOneByOne(OneByOne, Unbundled):
    pass


class BundledOneByOne(OneByOne, UnitStore):
    pass


def switch_off(model, bundled=False, overlap=False, prefetched=False, **_):
    """Put other objects in the place of those that a step does not have."""
    kind = UnitStore
    if not overlap:
        kind = BundledOneByOne if bundled else UnbundledOneByOne
    for layer in model.layers:
        ffn, store = layer.feed_forward, layer.feed_forward.store
        if ffn.predictor is None or ffn.whole.offsets is not None:
            continue
        store = kind(store.bundles, 1, store.cache, store.flash, store.buffer)
        prefetch = ffn.prefetch if prefetched else NoPrefetch()
        layer.feed_forward = FeedForward(ffn.neurons, store, ffn.predictor, prefetch)


def open_model(path, budget, step):
    """The Model of a step, with its window, or one token's where it forgets every token."""
    neurons, window = step.get("neurons", "predicted"), step.get("window")
    window = 1 if window == 0 else window
    options = Options(memory=budget, window=window, neurons=neurons, context=128)
    bundle = opened(path, options)
    made = prepare(bundle, options)
    gap_bytes = made.flash.gap_bytes  # without prefetch only neighbours are merged, or none
    if not step.get("prefetched"):
        gap_bytes = 0 if step.get("bundled") else -1
    made.flash.close()
    made = replace(made, flash=TimedFlash(path, gap_bytes=gap_bytes))
    if not step.get("resident", True):
        made = replace(made, plan=nothing_resident(made.plan))
    return Model(bundle, made, lambda *done: None)


def run_step(path, budget, name):
    """In a process of its own: the figures of one step, as a dict."""
    step = STEPS[name]
    n = TOKENS[step.get("neurons", "predicted")]
    with open_model(path, budget, step) as model:
        switch_off(model, **step)
        logits, flash = model.forward(PROMPT), model.flash
        flash.waited, before, begun = 0.0, flash.bytes_read, time.perf_counter()
        for _ in range(n):
            if step.get("window") == 0:
                for layer in model.layers:
                    layer.feed_forward.store.cache.empty()
            logits = model.forward([int(logits.argmax())])
        seconds = (time.perf_counter() - begun) / n
        nbytes = (flash.bytes_read - before) / n
    return {
        "step": name,
        "dram_bytes": peak_rss(),
        "bytes_per_token": nbytes,
        "waiting": flash.waited / n,
        "seconds": seconds,
    }


def measure(path, budget):
    rows = []
    for name in tqdm(STEPS, desc="steps", leave=False):
        command = [sys.executable, "-m", "bench.ablation", "--model", str(path)]
        command += ["--memory", str(budget), "--step", name]
        try:
            run = run_limited(command, budget, capture_output=True, text=True)
        except NoCgroups as error:
            print(f"without a memory cgroup: {error}", file=sys.stderr)
            run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{name}: {run.stderr or run.returncode}")
        rows.append(json.loads(run.stdout))
    return {"machine": machine(), "model": path.name, "budget": budget, "rows": rows}


def print_table(figures):
    first, second = (row["seconds"] for row in figures["rows"][:2])
    print(f"{figures['machine']}; {figures['model']}, {format_size(figures['budget'])} of DRAM\n")
    print("| | DRAM held | read per token | waiting for reads | token | against all read, hybrid |")
    print("|---|---|---|---|---|---|")
    for row in figures["rows"]:
        print(
            f"| {row['step']} | {row['dram_bytes'] / 1e6:,.0f} MB | "
            f"{row['bytes_per_token'] / 1e6:,.1f} MB | {1e3 * row['waiting']:.0f} ms | "
            f"{1e3 * row['seconds']:.0f} ms | {first / row['seconds']:.1f} x, "
            f"{second / row['seconds']:.1f} x |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: make one and remove it afterwards")
    parser.add_argument("--memory", type=size, help="default: half the model's file")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    add_json(parser)
    parser.add_argument("--plot", metavar="FILE", help="a PNG (needs the plot extra)")
    args = parser.parse_args()
    if args.step:
        print(json.dumps(run_step(args.model, args.memory, args.step)))
        return
    path = args.model or Path("bench-opt-1.3b-f16.flash")
    with synthetic_model(path, "opt-1.3b", keep=args.model is not None), Bundle(path) as bundle:
        figures = measure(path, args.memory or bundle.file.size // 2 // 4096 * 4096)
    print_table(figures)
    write_json(args.json, figures)
    if args.plot:
        from bench.plots import plot_ablation

        plot_ablation(figures, args.plot)


if __name__ == "__main__":
    main()
