"""How much of its reads a router that chooses before attention hides.

    python -m bench.early_router [MODEL] [--dir DIR] [-t THREADS] [--json FILE]

The experts that a token misses are read while its layer's attention is computed, and then the
experts that are in DRAM; some of them are guessed a layer before, and read while that is computed,
too. Measured are what a token takes, how long it waits for reads, and then the same reads by
themselves, in the same batches, one after the other. What is not waited for is hidden. Below stands
the same run without guesses, whose reads begin at the feed-forward layer's turn. What a token takes
beyond computing (all experts in DRAM) and waiting is sending reads, keeping the cache and computing
experts in more calls. One budget after the other, from the one with the fewest reads on. Each run
has a process of its own, as a budget counts all that a process holds.

Without MODEL a synthetic SmallThinker-4B-A0.6B in q4_0 is made in DIR (2.4 GB) and used.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench.limits import machine
from bench.models import synthetic_model
from flashinfer import Model
from flashinfer.cli.common import add_json, write_json
from flashinfer.paper.feedforward import FeedForward
from flashinfer.paper.flash import Flash
from flashinfer.paper.prefetch import NoPrefetch

LIKE, DTYPE = "smallthinker-4b-a0.6b", "q4_0"
SHARES = (0.9, 0.75, 0.5, 0.25)  # of the model's file
PROMPT, TOKENS, FIRST = 64, 48, 300  # token t + 1 follows token t
ROUNDS = 3
OPTIONS = {"context": 512, "draft": "off"}


def seconds(model: Model, before=lambda: None) -> list[float]:
    """What each token after a prompt takes."""
    model.reset()
    model.forward(list(range(FIRST, FIRST + PROMPT)))
    before()
    found = []
    for token in range(FIRST + PROMPT, FIRST + PROMPT + TOKENS):
        begun = time.perf_counter()
        model.forward([token])
        found.append(time.perf_counter() - begun)
    return found


class Batches:
    """What a model's flash is asked for, batch after batch, so that it can be asked again."""

    def __init__(self, flash: Flash) -> None:
        self.flash, self.submit, self.wait = flash, flash.submit, flash.wait
        self.batches: list[tuple] = []
        self.waited = 0.0  # seconds
        flash.submit = self._submit  # type: ignore[method-assign]
        flash.wait = self._wait  # type: ignore[method-assign]

    def _submit(self, offsets, lengths, memory, destinations, urgent=True):
        self.batches.append((offsets.copy(), lengths.copy(), memory, destinations.copy()))
        return self.submit(offsets, lengths, memory, destinations, urgent)

    def _wait(self, *arguments, **options):
        begun = time.perf_counter()
        try:
            return self.wait(*arguments, **options)
        finally:
            self.waited += time.perf_counter() - begun

    def forget(self) -> None:
        self.batches.clear()
        self.waited = 0.0

    def alone(self) -> float:
        """Seconds that all of them take, one after the other."""
        begun = time.perf_counter()
        for batch in self.batches:
            self.wait(self.submit(*batch))
        return time.perf_counter() - begun


def measured(path: Path, threads: int, share: float, early: bool) -> dict[str, float]:
    """Seconds a token of a run in a share of the model's file, and of its reads alone."""
    budget = int(share * path.stat().st_size) + (200 << 20)
    with Model.open(path, memory=budget, threads=threads, **OPTIONS) as model:
        if not early:
            for layer in model.layers:
                layer.feed_forward.prefetch = NoPrefetch()
                layer.feed_forward.choose_early = partial(at_its_turn, layer.feed_forward)
        batches = Batches(model.flash)
        token = statistics.fmean(seconds(model, batches.forget))
        waited = batches.waited / TOKENS
        asked = sum(int(lengths.sum()) for _, lengths, *_ in batches.batches)
        reads = batches.alone() / TOKENS
        expected = model.expected.total if model.expected else float("nan")
        waiting = model.expected.seconds.get("waiting for reads", 0) if model.expected else 0
    return {
        "seconds": token, "waited": waited, "reads": reads, "bytes": asked / TOKENS,
        "expected": expected, "expected_waiting": waiting,
    }  # fmt: skip


def at_its_turn(ffn: FeedForward, h, tokens) -> bool:
    """A FeedForward.choose_early that asks the router, but begins no read."""
    ffn.router.choose_early(h)
    return False


def in_memory(path: Path, threads: int) -> float:
    """Seconds a token with all experts in DRAM."""
    with Model.open(path, threads=threads, **OPTIONS) as model:
        seconds(model)
        return statistics.median(statistics.fmean(seconds(model)) for _ in range(ROUNDS))


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--dir", type=Path, default=Path("."))
    parser.add_argument("-t", "--threads", type=int, default=2)
    add_json(parser)
    args = parser.parse_args()
    path = args.model or args.dir / f"bench-{LIKE}-{DTYPE}.flash"
    with synthetic_model(path, LIKE, DTYPE, keep=args.model is not None):
        rows = table(path, args.threads)
    write_json(args.json, {"machine": machine(), "rows": rows})


def table(path: Path, threads: int) -> list[dict[str, Any]]:
    """Prints what is measured; its rows."""
    print(machine())
    compute = apart(in_memory, path, threads)
    print(f"computing alone: {1e3 * compute:.1f} ms a token\n")
    print(
        "| of the file | router | MB a token | reads alone, ms | waited, ms | hidden "
        "| a token, ms | expected, ms |"
    )
    print("|---" * 8 + "|")
    rows = []
    for share in SHARES:
        for early in (True, False):
            found = [apart(measured, path, threads, share, early) for _ in range(ROUNDS)]
            row = {key: statistics.median(one[key] for one in found) for key in found[0]}
            hidden = 1 - row["waited"] / max(row["reads"], 1e-9)
            rows.append(
                {"share": share, "early": early, "hidden": hidden, "compute": compute, **row}
            )
            ms = {
                key: f"{1e3 * row[key]:.1f}" for key in ("reads", "waited", "seconds", "expected")
            }
            print(
                f"| {share:.0%} | {'before attention' if early else 'at its turn'} "
                f"| {row['bytes'] / 1e6:.1f} | {ms['reads']} | {ms['waited']} | {hidden:.0%} "
                f"| {ms['seconds']} | {ms['expected']} |",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    main()
