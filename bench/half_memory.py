"""A model twice as large as memory: predicted neurons against reading everything.

    python -m bench.half_memory [--model x.flash] [--like opt-1.3b] [--json FILE]

Makes a synthetic bundle of the shape, runs it in a memory cgroup of exactly half its size (as
root), and prints tokens/s, bytes read, peak RSS, beside what the disk gives for reads of one
bundle's size. Skips with a message where cgroups cannot be made.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from bench.cgroup import NoCgroups, run_limited
from bench.limits import machine, random_read_bandwidth
from bench.models import synthetic_model
from flashinfer.cli.common import add_json, write_json
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.number_formats import FORMATS
from flashinfer.synth.shapes import NAMES

MODES = ("dense", "predicted")
TOKENS = {"dense": 12, "predicted": 48}


def run(model, mode, limit, threads):
    """Figures of one run in a cgroup of ``limit`` bytes; None where it was killed."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = [
            sys.executable, "-m", "flashinfer", "run", str(model), "--tokens", "5,7,9,11",
            "-n", str(TOKENS[mode]), "-c", "256", "--temp", "0", "--ignore-eos",
            "--neurons", mode, "--memory", str(limit), "--json", str(figures),
            *(["-t", str(threads)] if threads else []),
        ]  # fmt: skip
        result = run_limited(command, limit, capture_output=True, text=True)
        if result.returncode == -9:
            return None
        if result.returncode:
            raise subprocess.CalledProcessError(result.returncode, command, stderr=result.stderr)
        return json.loads(figures.read_text())


def measure(model, repeats, threads=None):
    """The table: one row a mode, medians over ``repeats`` runs, the modes in turn."""
    with Bundle(model) as bundle:
        size, row_bytes = bundle.file.size, bundle.tensors["layers.0.ffn.bundles"].row_bytes
    limit = size // 2 // 4096 * 4096
    runs = {mode: [] for mode in MODES}
    for mode in tqdm(MODES * repeats, desc="run", leave=False):
        figures = run(model, mode, limit, threads)
        if figures is None:
            raise SystemExit(f"{mode}: killed in a cgroup of {limit} bytes")
        runs[mode].append(figures)
    rows = []
    for mode in MODES:
        rows.append(
            {
                "neurons": mode,
                "tokens_per_second": statistics.median(r["tokens_per_second"] for r in runs[mode]),
                "flash_bytes_per_token": runs[mode][0]["flash_bytes_per_token"],
                "cache_hit_rate": runs[mode][0]["cache_hit_rate"],
                "peak_rss_bytes": max(r["peak_rss_bytes"] for r in runs[mode]),
            }
        )
    dense, predicted = (row["tokens_per_second"] for row in rows)
    same = runs["dense"][0]["token_ids"] == runs["predicted"][0]["token_ids"][: TOKENS["dense"]]
    return {
        "machine": machine(),
        "model_bytes": size,
        "limit_bytes": limit,
        "rows": rows,
        "speedup": predicted / dense,
        "same_tokens": same,
        "disk_bytes_per_second_at_bundle_size": random_read_bandwidth(model, row_bytes),
        "bundle_bytes": row_bytes,
    }


def print_table(figures):
    print(f"{figures['machine']}; medians")
    print(
        f"model {figures['model_bytes'] / 1e6:,.0f} MB, memory cgroup and budget "
        f"{figures['limit_bytes'] / 1e6:,.0f} MB\n"
    )
    print("| neurons | tokens/s | read per token | found in DRAM | peak RSS |")
    print("|---|---|---|---|---|")
    for row in figures["rows"]:
        print(
            f"| {row['neurons']} | {row['tokens_per_second']:.2f} | "
            f"{row['flash_bytes_per_token'] / 1e6:,.1f} MB | {100 * row['cache_hit_rate']:.0f} % | "
            f"{row['peak_rss_bytes'] / 1e6:,.0f} MB |"
        )
    floor = (
        figures["rows"][1]["flash_bytes_per_token"]
        / figures["disk_bytes_per_second_at_bundle_size"]
    )
    print(
        f"\npredicted is {figures['speedup']:.1f} x dense; the same tokens: "
        f"{'yes' if figures['same_tokens'] else 'NO'}\n"
        f"the disk: {figures['disk_bytes_per_second_at_bundle_size'] / 1e6:.0f} MB/s at random "
        f"reads of {figures['bundle_bytes']} bytes, so predicted could reach {1 / floor:.1f} "
        "tokens/s by reads alone"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a bundle; default: make one and remove it afterwards")
    parser.add_argument("--like", choices=NAMES, default="opt-1.3b")
    parser.add_argument("--dtype", choices=FORMATS, default="f16")
    parser.add_argument("--dir", default=".", help="where to make it (on the disk to measure)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int)
    add_json(parser)
    args = parser.parse_args()
    model = Path(args.model or Path(args.dir) / f"bench-{args.like}-{args.dtype}.flash")
    try:
        with synthetic_model(model, args.like, args.dtype, keep=args.model is not None):
            figures = measure(model, args.repeats, args.threads)
    except NoCgroups as error:
        raise SystemExit(f"skipped: {error}") from None
    print_table(figures)
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
