"""Whole tokens against the hardware's limits: number formats, memory sizes and disk speeds.

    python -m bench.end_to_end [--like NAME] [--quick] [--dir DIR] [--json FILE]

As root, with cgroups. Each configuration runs in a memory cgroup of a share of the model's file,
the disk as it is or held to an eMMC's or an SD card's speed. Two floors: the bytes read per token
over what the disk gives for reads of the size they came in (fio), and the bytes touched in DRAM
over its bandwidth (a plain sum). Beside the measured speed stands what the cost model expected
from a profile that is measured just before each size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from bench.cgroup import Disk, NoCgroups, run_limited
from bench.limits import machine, random_read_bandwidth
from bench.models import synthetic_model
from flashinfer.cli.common import add_json, write_json
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.plan.profile import save
from flashinfer.probe.measuring import dram_bandwidth
from flashinfer.probe.probing import probe
from flashinfer.synth.shapes import NAMES

DISKS = (
    Disk("as it is"),
    Disk("eMMC, 250 MB/s", 250_000_000),
    Disk("SD, 90 MB/s, 2000 reads/s", 90_000_000, 2000),
)
SHARES = (1.0, 0.5, 0.25, 0.125)
DTYPES = ("f16", "q4_0")
PROMPT = ",".join(str(5 + 7 * i) for i in range(128))  # fills the cache, too


def run(model, limit, disk, tokens, profile):
    """Figures of one run in cgroups, or a word where there are none."""
    with tempfile.TemporaryDirectory() as folder:
        figures, device = Path(folder) / "figures.json", Path(folder) / "device.json"
        save(profile.held(disk.bytes_per_second, disk.reads_per_second), device)
        command = [
            sys.executable, "-m", "flashinfer", "run", str(model), "--tokens", PROMPT,
            "-n", str(tokens), "-c", "176", "--device", str(device), "--temp", "0", "--ignore-eos",
            "--memory", str(limit), "--json", str(figures),
        ]  # fmt: skip
        result = run_limited(command, limit, disk, model, capture_output=True, text=True)
        if result.returncode == 1 and "is too small" in result.stderr:
            return "refused: " + result.stderr.rsplit(" is ", 1)[1].strip() + " needed"
        if result.returncode == -9:
            return "killed"
        if result.returncode:
            raise subprocess.CalledProcessError(result.returncode, command, stderr=result.stderr)
        return json.loads(figures.read_text())


class Limits:
    """What the hardware gives: fio's bytes/s by block size, a plain sum's over DRAM."""

    def __init__(self, path):
        self.path, self.dram, self.known = path, dram_bandwidth(), {}

    def reads(self, block_bytes):
        """Bytes/s of random reads of about this size (to the next power of two's quarter)."""
        step = max(512, 1 << max(0, int(block_bytes).bit_length() - 3))
        block = max(512, round(block_bytes / step) * step)
        if block not in self.known:
            self.known[block] = random_read_bandwidth(self.path, block)
        return self.known[block]


def floors(figures, bundle, disk, limits):
    """(seconds a token by reads, by DRAM): the least that this run's bytes can take, in as many
    reads as it made of them."""
    streamed, reads = figures["streamed_bytes_per_token"], figures["reads_per_token"]
    scattered = figures["flash_bytes_per_token"] - streamed
    size = scattered / max(1, reads)
    seconds = scattered / limits.reads(size) + streamed / limits.reads(1 << 20)
    seconds = disk.least_seconds(seconds, scattered + streamed, reads + streamed / (1 << 20))
    touched = sum(
        bundle.tensors[spec.name].nbytes
        for spec in bundle.specs
        if spec.role in ("small", "predictor", "attention", "head")
    )
    share = bundle.calibration.recorded[0].predicted
    touched += share * sum(bundle.tensors[s.name].nbytes for s in bundle.specs if s.role == "ffn")
    return seconds, touched / limits.dram


def measure(models, tokens, disks):
    limits, rows, known = Limits(models[0]), [], None
    for model in models:
        with Bundle(model) as bundle:
            cases = [(share, disk) for share in SHARES for disk in disks]
            for share, disk in tqdm(cases, desc=bundle.ffn_formats, leave=False):
                if known != (model, share):  # a shared machine changes: asked just before
                    known, profile = (model, share), probe(model)
                limit = int(bundle.file.size * share) // 4096 * 4096
                n = tokens if disk is DISKS[0] else max(4, tokens // 6)
                figures = run(model, limit, disk, n, profile)
                row = {"format": bundle.ffn_formats, "share": share, "disk": disk.name}
                if isinstance(figures, str):
                    rows.append({**row, "says": figures})
                    continue
                by_reads, by_dram = floors(figures, bundle, disk, limits)
                seconds = 1 / figures["tokens_per_second"]
                rows.append(
                    {
                        **row,
                        "limit_bytes": limit,
                        "floor_by_reads": by_reads,
                        "floor_by_dram": by_dram,
                        "seconds": seconds,
                        "ratio": seconds / max(by_reads, by_dram),
                        **{k: v for k, v in figures.items() if k != "token_ids"},
                    }
                )
    return {
        "machine": machine(),
        "dram": limits.dram,
        "fio": limits.known,
        "rows": rows,
    }


def print_table(figures):
    print(f"{figures['machine']}; DRAM {figures['dram'] / 1e9:.0f} GB/s\n")
    print(
        "| format | memory | disk | tokens/s | expected | read/token | in DRAM | peak RSS | "
        "floor: reads | floor: DRAM | time/floor |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in figures["rows"]:
        head = f"| {row['format']} | {100 * row['share']:g} % | {row['disk']} |"
        if "says" in row:
            print(f"{head} {row['says']} | | | | | | | |")
            continue
        print(
            f"{head} {row['tokens_per_second']:.2f} | {row['expected_tokens_per_second']:.2f} | "
            f"{row['flash_bytes_per_token'] / 1e6:.1f} MB | "
            f"{100 * row['cache_hit_rate']:.0f} % | {row['peak_rss_bytes'] / 1e6:.0f} of "
            f"{row['limit_bytes'] / 1e6:.0f} MB | {1e3 * row['floor_by_reads']:.0f} ms | "
            f"{1e3 * row['floor_by_dram']:.0f} ms | {row['ratio']:.2f} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--like", choices=NAMES, default="opt-1.3b", metavar="NAME",
                        help="a published shape (opt-1.3b); see flashinfer synth")  # fmt: skip
    parser.add_argument("--full", action="store_true", help="as --like opt-6.7b: 13.4 GB")
    parser.add_argument("--quick", action="store_true", help="only with the disk as it is")
    parser.add_argument("--dir", default=".", help="where to make the models, on the disk to test")
    parser.add_argument("--tokens", type=int, default=48, help="to write, a sixth on slow disks")
    parser.add_argument("--keep", action="store_true", help="do not remove the models")
    add_json(parser)
    parser.add_argument("--plot", metavar="FILE", help="a PNG (needs the plot extra)")
    args = parser.parse_args()
    like = "opt-6.7b" if args.full else args.like
    models = [Path(args.dir) / f"bench-{like}-{dtype}.flash" for dtype in DTYPES]
    try:
        with ExitStack() as stack:
            for model, dtype in zip(models, DTYPES, strict=True):
                stack.enter_context(synthetic_model(model, like, dtype, args.keep))
            figures = measure(models, args.tokens, DISKS[:1] if args.quick else DISKS)
    except NoCgroups as error:
        raise SystemExit(f"skipped: {error}") from None
    print_table(figures)
    write_json(args.json, figures)
    if args.plot:
        from bench.plots import plot_end_to_end

        plot_end_to_end(figures, args.plot)


if __name__ == "__main__":
    main()
