"""A recorded run as one page of HTML that plays it: nothing is loaded from elsewhere."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from flashinfer.formats.arrays import Int32Array
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.model import Model
from flashinfer.study.watch.recorder import MISSING, TokenRun
from flashinfer.study.watch.replay import (
    CHUNKS,
    DISKS,
    MEMORY,
    WINDOWS,
    Replay,
    Replayed,
    Setting,
    replay_all,
)

MOST_READS = 60_000  # whose offsets and sizes are listed one by one
BLOCK = 512  # bytes in which they are


@dataclass(frozen=True)
class Recorded:
    """A run to show.

    title, made  what it is of, and where and when it was made
    prompt       the text before the first token; pieces: the text that each run's token adds
    initial      the unit in each slot of each layer before the first of them
    """

    title: str
    made: str
    prompt: str
    pieces: Sequence[str]
    runs: Sequence[TokenRun]
    initial: Sequence[Int32Array]


def page(
    model: Model,
    recorded: Recorded,
    replay: Replay,
    taken: Replayed,
    as_recorded: Replayed,
    progress: Progress = no_progress,
) -> str:
    """The page of a run of a model, with what a Replay says it could have been otherwise.

    taken, as_recorded  what it took, ``measured``, and what the Replay says of ``own_setting``
    """
    own = own_setting(model)
    planned = replay_all(replay, progress)
    data = {
        **described(model, recorded.title, recorded.made, recorded.prompt),
        "initial": [units.tolist() for units in recorded.initial],
        "runs": told(recorded.runs, recorded.pieces, listed(recorded.runs)),
        "measured": _row(taken),
        "as_recorded": _row(as_recorded),
        "planned": [_row(one) for one in planned],
        "axes": {
            "memory": [f"{100 * share:g} % of them" for share in MEMORY],
            "window": [f"{k} tokens" if k else "as many as fit" for k in WINDOWS],
            "chunk": [f"{nbytes // 1024} KiB" for nbytes in CHUNKS],
            "disk": list(DISKS),
        },
        "start": {
            "memory": _nearest(MEMORY, own.memory),
            "window": WINDOWS.index(own.window) if own.window in WINDOWS else len(WINDOWS) - 1,
            "chunk": _nearest(CHUNKS, own.chunk),
            "disk": 0,
        },
        "how": (
            "The units that each token used are looked up again in a cache of another size or "
            "policy, and the reads that are missing are priced by the plan's clocks on "
            f"{replay.profile.name}. The first {replay.skipped} tokens, which find the cache "
            "empty, are left out of the means."
        ),
        "live": False,
    }
    return filled(data)


def described(model: Model, title: str, made: str, prompt: str) -> dict[str, Any]:
    """What the page says of a model before anything has run."""
    layers = [
        {"units": layer.feed_forward.store.units.rows,
         "slots": layer.feed_forward.store.cache.capacity}
        for layer in model.layers
    ]  # fmt: skip
    return {"title": title, "made": made, "prompt": prompt, "layers": layers}


def filled(data: dict[str, Any]) -> str:
    """The page's template with its script, and ``data`` in it."""
    folder = files("flashinfer.study.watch")
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = (folder / "page.html").read_text(encoding="utf-8")
    script = (folder / "page.js").read_text(encoding="utf-8")
    return template.replace("/*SCRIPT*/", script).replace("/*DATA*/", text)


def listed(runs: Sequence[TokenRun]) -> bool:
    """Whether there are so few reads that each is told by itself."""
    return sum(len(r.offsets) for run in runs for r in run.reads) <= MOST_READS


def told(runs: Sequence[TokenRun], pieces: Sequence[str], list_reads: bool) -> list[dict[str, Any]]:
    """Runs as the page has them: times in microseconds, offsets and sizes in 512 bytes."""
    return [_told(run, piece, list_reads) for run, piece in zip(runs, pieces, strict=True)]


def _told(run: TokenRun, piece: str, list_reads: bool) -> dict[str, Any]:
    layers = [
        {
            "begin": _us(layer.begin),
            "end": _us(layer.end),
            "used": layer.used.tolist(),
            "active": None if layer.active is None else layer.active.tolist(),
            "place": layer.place.tolist(),
            "slots": layer.slots.tolist(),
            "changed": layer.changed.tolist(),
        }
        for layer in run.layers
    ]
    reads = []
    for read in run.reads:
        one: list[Any] = [
            _us(read.begin), _us(read.end), read.layer, len(read.offsets), int(read.lengths.sum()),
        ]  # fmt: skip
        if list_reads:
            one += [(read.offsets // BLOCK).tolist(), (-(-read.lengths // BLOCK)).tolist()]
        reads.append(one)
    return {"text": piece, "begin": _us(run.begin), "end": _us(run.end), "layers": layers,
            "reads": reads}  # fmt: skip


def _us(seconds: float) -> int:
    return round(1e6 * seconds)


def measured(runs: Sequence[TokenRun]) -> Replayed:
    """What the tokens took, on average."""
    n = max(1, len(runs))
    used = sum(len(layer.used) for run in runs for layer in run.layers)
    missed = sum(
        int(np.count_nonzero(layer.place == MISSING)) for run in runs for layer in run.layers
    )
    return Replayed(
        seconds=max(1e-9, sum(run.end - run.begin for run in runs) / n),
        nbytes=sum(int(read.lengths.sum()) for run in runs for read in run.reads) / n,
        reads=sum(len(read.lengths) for run in runs for read in run.reads if not read.streamed) / n,
        hits=1 - missed / max(1, used),
    )


def own_setting(model: Model) -> Setting:
    """What a model runs with."""
    caches = [layer.feed_forward.store.cache for layer in model.layers]
    share = sum(cache.capacity for cache in caches) / sum(len(cache.slot_of) for cache in caches)
    return Setting(
        memory=share,
        window=model.plan.window or 0,
        chunk=model.flash.gap_bytes,
        disk=0.0,
        predict=any(model.plan.chooses(layer.feed_forward.neurons.config)
                    for layer in model.layers),
    )  # fmt: skip


def _nearest(values: Sequence[float], value: float) -> int:
    return min(range(len(values)), key=lambda i: abs(values[i] - value))


def _row(found: Replayed) -> list[float]:
    return [
        float(f"{value:.4g}") for value in (found.seconds, found.nbytes, found.reads, found.hits)
    ]
