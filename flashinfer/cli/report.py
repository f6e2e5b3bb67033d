"""Measure a machine and say how the engine does on it, as a page to be pasted into an issue.

It probes the flash of the directory, and runs the demo model and a synthetic one of a published
shape, half of it in memory: what was expected stands beside what was measured. It takes some
minutes, and room on the disk for that model, which is removed again. The page names the CPU, the
kernel and the kind of storage, and nothing of whose they are: no host, no user, no paths.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer import __version__, kernels
from flashinfer.cli.common import add_json, positive, progress_bars, write_json
from flashinfer.cli.run import demo_model
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.errors import UserError, printable
from flashinfer.formats.files import replacing, scratch_directory
from flashinfer.plan.memory import format_size
from flashinfer.plan.profile import Profile, save
from flashinfer.probe.probing import probe
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import config_like

SHAPES = ("opt-1.3b", "opt-350m", "opt-125m")  # the largest of which there is room for is run
ROOM = 3  # times its size should be free
DTYPE = "q8_0"
PROCESS = 64 << 20  # bytes that the process takes beside half of the model
KINDS = {
    "nvme": "NVMe",
    "mmcblk": "SD card or eMMC",
    "sd": "SATA, SCSI or USB",
    "vd": "virtual disk",
}
TOKENS = 32


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", default=".", metavar="DIR", help="where models lie (.)")
    parser.add_argument("-t", "--threads", type=positive, help="default: the cores there are")
    parser.add_argument(
        "--like", choices=SHAPES, metavar="NAME",
        help=f"{', '.join(SHAPES)}; default: the largest there is room for",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", help="write the page there")
    add_json(parser)


def main(args: Namespace) -> None:
    folder = Path(args.path)
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a directory")
    with scratch_directory(folder, "report") as scratch, progress_bars() as progress:
        found = probe(folder, args.threads, "auto", progress)
        save(found, scratch / "profile.json")
        runs = [run("demo, all of it", demo_model(), scratch, args.threads, "1G")]
        shape = args.like or largest(shutil.disk_usage(folder).free)
        if shape is not None:
            path = scratch / "model.flash"
            synthesize(path, config_like(shape, 256), DTYPE, progress=progress)
            half = f"{(path.stat().st_size // 2 + PROCESS) >> 20}M"
            for neurons in ("predicted", "dense"):
                name = f"{shape} {DTYPE} in {half}, {neurons}"
                runs.append(run(name, path, scratch, args.threads, half, neurons))
    figures = {"machine": machine(folder), "profile": without_names(found), "runs": runs}
    page = page_of(figures)
    if args.output:
        with replacing(Path(args.output)) as file:
            file.write(page.encode())
    elif args.json != "-":
        print(page, end="")
    write_json(args.json, figures)


def largest(free: int) -> str | None:
    """The largest of SHAPES for which there is room among ``free`` bytes; None: there is none."""
    for name in SHAPES:
        config = config_like(name, 256)
        wide = config["num_hidden_layers"] * 12 * config["hidden_size"] ** 2
        if ROOM * (wide + config["vocab_size"] * config["hidden_size"]) < free:
            return name
    return None


def run(
    name: str, model: Path, scratch: Path, threads: int | None, memory: str,
    neurons: str | None = None,
) -> JsonObject:  # fmt: skip
    """Figures of a model that writes TOKENS tokens, in a process of its own."""
    command = [
        sys.executable, "-m", "flashinfer", "run", str(model), "--tokens", "5,7,9", "--ignore-eos",
        "-n", str(TOKENS), "--temp", "0", "--draft", "off", "--memory", memory, "-c", "256",
        "--device", str(scratch / "profile.json"), "--json", "-",
    ]  # fmt: skip
    command += ["--neurons", neurons] if neurons else []
    command += ["-t", str(threads)] if threads else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        return {"name": name, "failed": lines[-1].replace(str(scratch), "...")}
    figures = json.loads(done.stdout)
    keys = ("tokens_per_second", "expected_tokens_per_second", "flash_bytes_per_token",
            "expected_flash_bytes_per_token", "peak_rss_bytes", "memory_budget_bytes")  # fmt: skip
    return {"name": name, "failed": None, **{key: figures[key] for key in keys}}


def machine(folder: Path) -> JsonObject:
    """What the machine is, without what is its owner's."""
    return {
        "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"Linux {platform.release()} {platform.machine()}",
        "storage": _storage(os.stat(folder).st_dev),
        "flashinfer": __version__, "kernels": kernels.describe(),
        "python": platform.python_version(), "numpy": np.__version__,
    }  # fmt: skip


def _cpu() -> str:
    """The name of the CPU, or of the board."""
    for path, key in (("/proc/device-tree/model", ""), ("/proc/cpuinfo", "model name")):
        text = _text(Path(path))
        line = next((line for line in text.splitlines() if key in line), "")
        if line:
            return line.rpartition(": ")[2].strip("\0 ")
    return platform.machine()


def _storage(device: int) -> str:
    """The kind and the model of the disk that holds a device."""
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for disk in (block, block.parent):
        if (disk / "queue").is_dir():
            model = _text(disk / "device" / "model") or _text(disk / "device" / "name")
            kind = next((KINDS[k] for k in KINDS if disk.name.startswith(k)), "disk")
            return f"{kind} {model.strip()}".strip()
    return "storage unknown"


def _text(path: Path) -> str:
    """A file's text, or an empty one where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def without_names(profile: Profile) -> JsonObject:
    """The profile as JSON, without the name of the host and of the directory."""
    return {**profile.as_json(), "name": "measured for a report"}


def page_of(figures: JsonObject) -> str:
    """The figures as Markdown."""
    machine, profile = figures["machine"], figures["profile"]
    lines = [
        f"**{machine['cpu']}**, {machine['cores']} cores, {format_size(machine['memory_bytes'])}; "
        f"{machine['storage']}; {machine['kernel']}", "",
        f"flashinfer {machine['flashinfer']}, {machine['kernels']}, Python {machine['python']}, "
        f"NumPy {machine['numpy']}", "",
        "| run | tokens/s | expected | read per token | expected | peak memory |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [_row(run) for run in figures["runs"]]
    reads = ", ".join(f"{int(s) >> 10} KiB: {v / 1e6:,.0f}" for s, v in profile["reads"].items())
    linear = ", ".join(f"{name} {v / 1e9:.1f}" for name, v in profile["linear"].items())
    lines += [
        "", f"Random reads, MB/s: {reads}", "",
        f"DRAM {profile['dram'] / 1e9:.1f} GB/s; products, GB/s of weights: {linear}",
    ]  # fmt: skip
    return "".join(f"{printable(line)}\n" for line in lines)


def _row(run: dict[str, Any]) -> str:
    if run["failed"]:
        return f"| {run['name']} | {run['failed']} | | | | |"
    cells = [
        run["name"], f"{run['tokens_per_second']:.2f}", f"{run['expected_tokens_per_second']:.2f}",
        f"{run['flash_bytes_per_token'] / 1e6:.2f} MB",
        f"{run['expected_flash_bytes_per_token'] / 1e6:.2f} MB", format_size(run["peak_rss_bytes"]),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"
