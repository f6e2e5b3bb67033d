"""Files as people download them, in memory that is too small for them; llama.cpp beside it.

    python -m bench.downloads [--only NAME] [--dir DIR] [--json FILE]

Mixtures of published shapes, as GGUF files in the mix of number formats that they are mostly
downloaded in (bench/gguf_models.py), 2.5 to 21 GB each. ``convert`` makes a bundle of the same
bytes; "in place" are those of the GGUF file itself, read where they lie. As root, with cgroups:
each run lives in a memory cgroup of exactly the size named, the disk as it is or held to 250 MB/s,
and begins cold. A prompt, then single tokens, ROUNDS times in turn, of which the median run is
shown; the floor is as in bench.end_to_end.

llama.cpp (llama-cpp-python) maps the GGUF file in the same cgroup, without the copy of 4-bit
weights that it makes where memory allows, and is given the same tokens. Without it its rows are
skipped.
"""

import argparse
import sys
import tempfile
import time
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path

from tqdm import tqdm

from bench.cgroup import NoCgroups
from bench.gguf_models import write_gguf
from bench.limits import machine, random_read_bandwidth
from bench.mixtures import DISKS, FIRST, LLAMA, floor, limited
from flashinfer.cli.common import add_json, progress_bars, write_json
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import convert
from flashinfer.plan.profile import save
from flashinfer.probe.measuring import dram_bandwidth
from flashinfer.probe.probing import probe
from flashinfer.synth.shapes import config_like

GIB = 1 << 30
SHAPES = {  # the mix of number formats, GiB of memory
    "smallthinker-4b-a0.6b": ("Q4_0", 1),
    "lfm2-8b-a1b": ("Q4_K_M", 2),
    "qwen3-30b-a3b": ("Q4_K_M", 4),
    "gpt-oss-20b": ("MXFP4", 4),
    "qwen3.5-35b-a3b": ("Q4_K_M", 4),
}
PROMPT, TOKENS, ROUNDS = 32, 32, 3
THEIR_PROMPT, THEIR_TOKENS = 8, 6
PATIENCE = 900  # seconds for a run


ENGINES = "bundle", "in place", "llama.cpp"


def runs_of(model, placed, gguf, memory, engines):
    """One row for each disk and engine; placed: the bundle that has weights in the GGUF file."""
    rows, dram = [], dram_bandwidth()
    with Bundle(model) as bundle, tempfile.TemporaryDirectory() as folder:
        device = Path(folder) / "device.json"
        for disk in DISKS:
            profile, reads = probe(model), random_read_bandwidth(model, 1 << 20)
            save(profile.held(disk.bytes_per_second), device)
            runs = {engine: [] for engine in engines}
            in_turn = [e for i in range(ROUNDS) for e in engines if i == 0 or e != "llama.cpp"]
            for engine in tqdm(in_turn, desc=disk.name, leave=False):
                if engine == "llama.cpp":
                    n = THEIR_TOKENS if disk is DISKS[0] else THEIR_TOKENS // 3
                    call = [LLAMA, gguf, FIRST, THEIR_PROMPT, n, profile.threads]
                else:
                    n = TOKENS if disk is DISKS[0] else TOKENS // 4
                    path = model if engine == "bundle" else placed
                    arguments = f"{str(path)!r}, {memory}, {str(device)!r}, {n}, {PROMPT}"
                    call = [f"from bench.mixtures import run_ours; run_ours({arguments})"]
                command = [sys.executable, "-c", *map(str, call)]
                runs[engine].append(limited(command, memory, disk, model, PATIENCE))
            for engine in engines:
                row = {"disk": disk.name, "engine": engine, "reads": reads, "dram": dram}
                said = [found for found in runs[engine] if isinstance(found, str)]
                if said:
                    rows.append({**row, "says": said[0]})
                    continue
                found = sorted(runs[engine], key=itemgetter("tokens_per_second"))
                found = found[len(found) // 2]
                row.update(found)
                if engine != "llama.cpp":
                    row["floor_seconds"] = floor(found, bundle, disk, reads, dram)
                    row["ratio"] = 1 / found["tokens_per_second"] / row["floor_seconds"]
                rows.append(row)
    return rows


def measure(like, directory, engines):
    """The rows of a shape, which is made and removed again."""
    mix, gib = SHAPES[like]
    gguf = directory / f"bench-{like}-{mix}.gguf"
    model, placed, seconds = gguf.with_suffix(".flash"), gguf.with_name(f"{gguf.name}.flash"), []
    try:
        write_gguf(gguf, config_like(like), mix)
        for path in (model, placed):
            begun = time.perf_counter()
            with progress_bars() as progress:
                convert(gguf, path, progress=progress, in_place=path == placed)
            seconds.append(time.perf_counter() - begun)
        rows = runs_of(model, placed, gguf, gib * GIB, engines)
        same = {"like": like, "mix": mix, "memory": gib * GIB, "file": model.stat().st_size,
                "file_in_place": placed.stat().st_size, "seconds_to_convert": seconds[0],
                "seconds_to_convert_in_place": seconds[1]}  # fmt: skip
        return [{**same, **row} for row in rows]
    finally:
        for path in (gguf, model, placed):
            path.unlink(missing_ok=True)


def print_row(row):
    head = (
        f"| {row['like']}, {row['mix']} | {row['file'] / 1e9:.1f} GB | {row['memory'] / GIB:g} GiB "
        f"| {row['disk']} | {row['engine']} |"
    )
    if "says" in row:
        print(f"{head} {row['says']} | | | | | | |", flush=True)
        return
    parts = [f"{row['tokens_per_second']:.2f}"]
    if row["engine"] != "llama.cpp":
        parts += [
            f"{row['expected_tokens_per_second']:.2f}",
            f"{row['flash_bytes_per_token'] / 1e6:.0f} MB",
            f"{100 * (1 - row['cache_hit_rate']):.0f} %",
            f"{row['peak_rss_bytes'] / 1e6:.0f} of {row['memory'] / 1e6:.0f} MB",
            f"{row['ratio']:.2f}",
        ]
    else:
        parts += [""] * 5
    parts.append(f"{row['prompt_tokens_per_second']:.1f}")
    print(head, " | ".join(parts), "|", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SHAPES, action="append", metavar="NAME",
                        help=f"one of {', '.join(SHAPES)}; may be given several times")  # fmt: skip
    parser.add_argument("--dir", default=".", type=Path, help="room for two models of 21 GB")
    parser.add_argument("--engine", choices=ENGINES, action="append",
                        help="only this one; may be given several times")  # fmt: skip
    add_json(parser)
    args = parser.parse_args()
    engines = args.engine or list(ENGINES)
    if "llama.cpp" in engines and not find_spec("llama_cpp"):
        print("llama.cpp is skipped: pip install llama-cpp-python", file=sys.stderr)
        engines.remove("llama.cpp")
    print(f"{machine()}; prompts of {PROMPT} tokens, llama.cpp's of {THEIR_PROMPT}\n")
    print("| model | file | memory | disk | engine | tokens/s | expected | read/token | missed | "
          "peak RSS | time/floor | prompt, tokens/s |")  # fmt: skip
    print("|---" * 12 + "|")
    rows = []
    try:
        for like in args.only or SHAPES:
            found = measure(like, args.dir, engines)
            for row in found:
                print_row(row)
            rows += found
    except NoCgroups as error:
        raise SystemExit(f"skipped: {error}") from None
    write_json(args.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
