"""The time to the first token of a long prompt: computed, and read back from a session.

    python -m bench.session [--model x.flash] [--like opt-1.3b] [--prompt 512] [--json FILE]

Makes a synthetic bundle of the shape, and starts `flashinfer run` on the same prompt twice, the
second time with the session that the first one left, in memory cgroups (as root) of half the
model's size and of twice its size. The time to the first token is what follows the opening of the
model: the prompt computed, or the session read and what is left of the prompt. Beside it stands the
time from the start of the process to the first token on its standard output.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench.cgroup import NoCgroups, run_limited
from bench.limits import machine
from bench.models import synthetic_model
from flashinfer.cli.common import add_json, positive, write_json
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.synth.shapes import NAMES
from flashinfer.transformer.kv_cache import KV_DTYPES


def first_token(command, limit):
    """Seconds until a command, in a cgroup of ``limit`` bytes, writes its first byte."""
    reading, writing = os.pipe()
    found = []

    def wait():
        if os.read(reading, 1):
            found.append(time.perf_counter())
        while os.read(reading, 4096):
            pass

    watcher = threading.Thread(target=wait)
    watcher.start()
    begun = time.perf_counter()
    try:
        run = run_limited(command, limit, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
        watcher.join()
        os.close(reading)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}: {run.returncode}: {run.stderr}")
    return found[0] - begun


def measure(model, prompt, repeats, dtype):
    """One row a memory size."""
    with Bundle(model) as bundle:
        size, vocabulary = bundle.file.size, bundle.config.vocab_size
    ids = ",".join(str(3 + 37 * i % (vocabulary - 3)) for i in range(prompt))
    rows = []
    for name, limit in (("half", size // 2 // 4096 * 4096), ("twice", 2 * size // 4096 * 4096)):
        found = {"cold": [], "resumed": []}
        with tempfile.TemporaryDirectory(dir=model.parent) as folder:
            figures, session = Path(folder) / "figures.json", Path(folder) / "x.session"
            command = [
                sys.executable, "-m", "flashinfer", "run", str(model), "--tokens", ids, "-n", "4",
                "--temp", "0", "--ignore-eos", "--memory", str(limit), "--kv-dtype", dtype,
                "--session", str(session), "--json", str(figures),
            ]  # fmt: skip
            for _ in range(repeats):
                session.unlink(missing_ok=True)
                for kind in found:
                    seconds = first_token(command, limit)
                    told = json.loads(figures.read_text())
                    assert told["session"]["resumed_tokens"] == (prompt - 1) * (kind == "resumed")
                    found[kind].append({"seconds": seconds, **told})
            assert found["cold"][0]["token_ids"] == found["resumed"][0]["token_ids"]
            nbytes = session.stat().st_size
        row = {"memory": name, "limit_bytes": limit, "session_bytes": nbytes}
        for kind, runs in found.items():
            row[f"{kind}_process"] = statistics.median(run["seconds"] for run in runs)
            row[kind] = statistics.median(
                run["prompt_tokens"] / run["prompt_tokens_per_second"]
                + run["session"]["read_seconds"]
                for run in runs
            )
        for key in ("read_seconds", "write_seconds"):
            row[key] = statistics.median(run["session"][key] for run in found["resumed"])
        peaks = [run["peak_rss_bytes"] for runs in found.values() for run in runs]
        row["peak_rss_bytes"] = max(peaks)
        rows.append(row)
    return {
        "machine": machine(), "model_bytes": size, "prompt": prompt, "kv_dtype": dtype, "rows": rows
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("session.flash"))
    parser.add_argument("--like", choices=NAMES, default="opt-1.3b")
    parser.add_argument("--prompt", type=positive, default=512, metavar="TOKENS")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="f16")
    parser.add_argument("--repeats", type=positive, default=3)
    add_json(parser)
    args = parser.parse_args()
    with synthetic_model(args.model, args.like) as model:
        try:
            figures = measure(model.resolve(), args.prompt, args.repeats, args.kv_dtype)
        except NoCgroups as why:
            raise SystemExit(f"skipped: {why}") from None
    print(
        f"{figures['machine']}; medians of {args.repeats}\n"
        f"model {figures['model_bytes'] / 1e6:,.0f} MB, a prompt of {args.prompt} tokens, "
        f"{args.kv_dtype} keys\n\n"
        "| memory | first token, computed | with the session | of which reading it | the process, "
        "computed | with the session | saving | its size | peak RSS |\n|---|---|---|---|---|---|---"
        "|---|---|"
    )
    for row in figures["rows"]:
        print(
            f"| {row['limit_bytes'] / 1e6:,.0f} MB | {row['cold']:.2f} s | {row['resumed']:.2f} s "
            f"| {row['read_seconds']:.2f} s | {row['cold_process']:.2f} s "
            f"| {row['resumed_process']:.2f} s | {row['write_seconds']:.2f} s "
            f"| {row['session_bytes'] / 1e6:,.0f} MB | {row['peak_rss_bytes'] / 1e6:,.0f} MB |"
        )
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
