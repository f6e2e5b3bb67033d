"""What the hardware gives, measured by means other than ours: fio or dd, and a plain sum."""

import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path


def machine():
    """One line that names the machine."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        model = next(
            line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line
        )
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    family = "family " + text.split("cpu family\t: ")[1].split()[0] if "cpu family" in text else ""
    return f"{model} {family}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}"


ENGINES = (  # of fio: many threads, or one with many in flight
    ["--ioengine=psync", "--numjobs=32"],
    ["--ioengine=io_uring", "--numjobs=1", "--iodepth=128"],
)


def random_read_bandwidth(path, block_bytes, seconds=3):
    """Bytes/s of random O_DIRECT reads of one block size, many in flight: fio's best, or else dd.

    dd reads one block after another and so gives less; it is only the fallback.
    """
    block = max(512, block_bytes // 512 * 512)
    if shutil.which("fio"):
        return max(_fio(path, block, seconds, engine) for engine in ENGINES)
    count = min(20000, os.path.getsize(path) // block)
    begun = time.perf_counter()
    subprocess.run(
        ["dd", f"if={path}", "of=/dev/null", f"bs={block}", f"count={count}", "iflag=direct"],
        capture_output=True, check=True,
    )  # fmt: skip
    return count * block / (time.perf_counter() - begun)


def _fio(path, block, seconds, engine):
    run = subprocess.run(
        ["fio", "--name=r", f"--filename={path}", "--rw=randread", f"--bs={block}", *engine,
         "--direct=1", "--thread", "--readonly", "--time_based", f"--runtime={seconds}",
         "--group_reporting", "--output-format=json",
         f"--size={os.path.getsize(path) // block * block}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:  # no io_uring, say
        return 0
    return json.loads(run.stdout)["jobs"][0]["read"]["bw_bytes"]
