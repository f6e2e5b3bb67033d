"""Neurons that lie beside those that they fire with: what a token reads and takes, and without.

    python -m bench.coactivation [MODEL] [--memory SIZE | --slots SHARE] [--json FILE]

Makes a copy of a calibrated model whose neurons lie along a path through what its own predictors
name, as ``flashinfer calibrate --layout coactivation`` lays them out, and with the same predictors.
Both then process the same further text token by token, in turn, as root in a memory cgroup of
--memory (half the model's file), with the disk as it is or held. --slots instead keeps this share
of each layer's neurons in DRAM, for a model that is small beside the process. A model without a
tokenizer gets random tokens. The logits must be the same, bit by bit.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.cgroup import Disk, NoCgroups, run_limited
from bench.end_to_end import DISKS
from bench.limits import machine
from flashinfer import Model
from flashinfer.calibration.coactivation import lay_out
from flashinfer.cli.common import add_json, share, size, write_json
from flashinfer.cli.run import demo_model
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.bundle.writer import laid_out, stored_tensors, write_bundle
from flashinfer.formats.progress import no_progress
from flashinfer.plan.memory import format_size
from flashinfer.plan.options import Options
from flashinfer.plan.profile import save
from flashinfer.plan.setup import opened, prepare
from flashinfer.probe.probing import probe
from flashinfer.study.activity import Sample, Study
from flashinfer.study.experiments import failed
from flashinfer.text.own_texts import stdlib_files
from flashinfer.text.tokenizer import Tokenizer

PROMPT = 128  # tokens, which fill the cache, too
LAYOUTS = ("trained", "coactivation")


def texts(path, tokens, n):
    """(ids to find the layout by, ids to run on): of the library, or random where the model has no
    tokenizer."""
    with Bundle(path) as bundle:
        if bundle.tokenizer_json() is None:
            ids = np.random.default_rng(0).integers(5, bundle.config.vocab_size, tokens + n)
            return ids[:tokens].tolist(), ids[tokens:].tolist()
        tokenizer = Tokenizer(bundle, None)
    try:
        train, held_out = stdlib_files()
        found = []
        for files, count in ((train[7::50], tokens), (held_out, n)):
            found.append(tokenizer.encode("\n".join(text[:1200] for text in files))[:count])
        return found
    finally:
        tokenizer.close()


def moved(path, target, ids, device):
    """Write the copy; returns the reads of its missing neurons, of those that any would take."""
    failed.TOKENS = len(ids)
    traces = failed.chosen(Study(path, [Sample("text", ids)], Options(draft="off"), device))
    with Bundle(path) as bundle:
        layouts = []
        for number, trace in enumerate(tqdm(traces, desc="paths", leave=False)):
            used = np.zeros((len(trace), bundle.bundles(number).rows), dtype=bool)
            for token, selection in enumerate(trace):
                used[token, selection.units] = True
            bits = np.packbits(used.T, axis=1)
            layouts.append(lay_out(bits, len(trace), bundle.unit_bytes(number)))
        records = zip(bundle.calibration.layers, layouts, strict=True)
        layers = tuple(replace(record, reads=layout.reads) for record, layout in records)
        kept = stored_tensors(bundle, lambda name: not name.endswith(".ffn.places"))
        tensors = laid_out(bundle, kept, dict(enumerate(one.places for one in layouts)))
        calibration = replace(bundle.calibration, layers=layers)
        write_bundle(target, tensors, bundle.hf_config, bundle.source, calibration)
    return statistics.mean(layout.reads for layout in layouts)


def run_one(path, ids, memory, slots, device):
    """In a process of its own: the figures of one run, as a dict."""
    options = Options(memory=memory, context=len(ids), device=device, draft="off")
    bundle = opened(path, options)
    setup = prepare(bundle, options)
    if slots is not None:
        units = [layer.ffn.units for layer in bundle.config.layers]
        kept = tuple(round(slots * n) for n in units)
        cache = sum(n * each for n, each in zip(kept, setup.plan.slot_bytes, strict=True))
        setup = replace(setup, plan=replace(setup.plan, slots=kept, cache=cache))
    digest = hashlib.sha256()
    with Model(bundle, setup, no_progress) as model:
        begun = time.perf_counter()
        digest.update(model.forward(ids[:PROMPT]).tobytes())
        prompt = PROMPT / (time.perf_counter() - begun)
        flash, n = model.flash, len(ids) - PROMPT
        reads, nbytes, begun = flash.reads, flash.bytes_read, time.perf_counter()
        for token in ids[PROMPT:]:
            digest.update(model.forward([token]).tobytes())
        seconds = time.perf_counter() - begun
        return {
            "reads_per_token": (flash.reads - reads) / n,
            "bytes_per_token": (flash.bytes_read - nbytes) / n,
            "tokens_per_second": n / seconds,
            "prompt_tokens_per_second": prompt,
            "expected_reads": model.expected.requests if slots is None else None,
            "expected_tokens_per_second": 1 / model.expected.total if slots is None else None,
            "digest": digest.hexdigest(),
        }


def in_cgroup(path, ids, memory, slots, device, disk):
    """``run_one`` in a process of its own, held to so much memory and such a disk."""
    task = json.dumps([str(path), ids, memory, slots, str(device)])
    command = [sys.executable, "-m", "bench.coactivation", "--one", task]
    limit = memory if slots is None else 1 << 31
    try:
        run = run_limited(command, limit, disk, path, capture_output=True, text=True)
    except NoCgroups as error:
        if disk != Disk("as it is"):
            return None
        print(f"without cgroups: {error}", file=sys.stderr)
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr or f"ended with {run.returncode}")
    return json.loads(run.stdout)


def measure(path, other, args, memory, ids, profile):
    """Rows of the table, a layout and a disk each: medians over the runs, layouts in turn."""
    rows = []
    for disk in DISKS if not args.quick else DISKS[:1]:
        n = args.tokens if disk is DISKS[0] else max(8, args.tokens // 6)
        runs = {layout: [] for layout in LAYOUTS}
        with tempfile.TemporaryDirectory() as folder:
            device = Path(folder) / "device.json"
            save(profile.held(disk.bytes_per_second, disk.reads_per_second), device)
            for layout in tqdm(LAYOUTS * args.repeats, desc=disk.name, leave=False):
                file = path if layout == "trained" else other
                figures = in_cgroup(file, ids[: PROMPT + n], memory, args.slots, device, disk)
                runs[layout] += [] if figures is None else [figures]
        for layout, found in runs.items():
            if found:
                first = {**found[0], "disk": disk.name, "layout": layout}
                for key in ("tokens_per_second", "prompt_tokens_per_second"):
                    first[key] = statistics.median(figures[key] for figures in found)
                first["pairs"] = [
                    b["tokens_per_second"] / a["tokens_per_second"]
                    for a, b in zip(runs["trained"], found, strict=True)
                ]
                rows.append(first)
        if len({figures["digest"] for found in runs.values() for figures in found}) > 1:
            raise SystemExit("the logits differ")
    return rows


def print_table(figures):
    room = f"{100 * figures['slots']:g} % of the neurons" if figures["slots"] else "a budget of "
    room += "" if figures["slots"] else format_size(figures["memory"])
    print(f"{figures['machine']}; {figures['model']}, {room} in DRAM; the same logits\n")
    print(f"by calibration, of the reads that as many anywhere take: {figures['reads']:.2f}\n")
    print("| disk | layout | reads/token | read/token | tokens/s | of trained | prompt, tokens/s "
          "| expected: reads | tokens/s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for row in figures["rows"]:
        expected = "| |"
        if row["expected_reads"] is not None:
            expected = f"{row['expected_reads']:,.0f} | {row['expected_tokens_per_second']:.2f} |"
        print(
            f"| {row['disk']} | {row['layout']} | {row['reads_per_token']:,.0f} | "
            f"{row['bytes_per_token'] / 1e6:,.2f} MB | {row['tokens_per_second']:.2f} | "
            f"{statistics.median(row['pairs']):.2f} x | {row['prompt_tokens_per_second']:.0f} | "
            f"{expected}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="default: the demo model")
    parser.add_argument("--memory", type=size, help="default: half the model's file")
    parser.add_argument("--slots", type=share, metavar="SHARE", help="of each layer's neurons")
    parser.add_argument("--path-tokens", type=int, default=2048, help="to find the layout by")
    parser.add_argument("--tokens", type=int, default=96, help="to measure, fewer on held disks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="only the disk as it is")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    add_json(parser)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(*args.one)))
        return
    path = args.model or demo_model()
    profile = probe(path.parent)
    memory = args.memory or path.stat().st_size // 2 // 4096 * 4096
    memory = memory if args.slots is None else None
    known, ids = texts(path, args.path_tokens, PROMPT + args.tokens)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="coactivation-") as folder:
        other = Path(folder) / "other.flash"
        reads = moved(path, other, known, profile)
        rows = measure(path, other, args, memory, ids, profile)
    figures = {"machine": machine(), "model": path.name, "memory": memory, "slots": args.slots,
               "reads": reads, "rows": rows}  # fmt: skip
    print_table(figures)
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
