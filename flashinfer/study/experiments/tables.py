"""The paper's tables, row by row: what it measured, and what the plan expects on this machine."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.paper.pieces import one_piece
from flashinfer.plan.expected_reads import expected_reads
from flashinfer.study.activity import Study
from flashinfer.study.expected import expected
from flashinfer.study.findings import Cell, Chart, Finding, Table
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import config_like

# {shape: (milliseconds of a token with everything read, with all of the paper's ideas)}, on a CPU.
END_TO_END = {
    "opt-6.7b": (3182, 669),
    "falcon-7b": (3095, 706),
    "persimmon-8b": (3806, 1041),
    "phi-2": (1287, 546),
    "llama-2-7b": (3095, 994),
}
# The paper's steps for OPT-6.7B: (name, GB in DRAM, GB read a token, GB/s, milliseconds of I/O).
STEPS = (
    ("nothing kept", 0.0, 13.4, 6.10, 2196),
    ("hybrid: half the model", 6.7, 6.7, 6.10, 1090),
    ("+ predictor", 4.8, 0.9, 1.25, 738),
    ("+ window of 5 tokens", 6.5, 0.2, 1.25, 164),
    ("+ bundling", 6.5, 0.2, 2.25, 87),
)
WINDOW = 5


class Step(NamedTuple):
    """What a token reads in one of the steps, and how long the reads take."""

    nbytes: float
    seconds: float


def run(study: Study) -> Finding:
    """The Finding for the study's profile."""
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory(prefix="flashinfer-study-") as folder:
        steps: list[Step] = []
        for number, (name, theirs) in enumerate(END_TO_END.items()):
            study.progress("tables", number, len(END_TO_END))
            path = Path(folder) / f"{name}.flash"
            synthesize(path, config_like(name, 2048), "f16", outline=True)
            with Bundle(path) as bundle:
                if not steps:
                    steps = list(_steps(study, bundle))
                rows.append(_end_to_end(study, bundle, name, theirs))
        study.progress("tables", len(END_TO_END), len(END_TO_END))
    ablation: list[list[Cell]] = [
        [name, dram, read, speed, ms, got.nbytes / 1e9, got.nbytes / got.seconds / 1e9,
         1e3 * got.seconds]
        for (name, dram, read, speed, ms), got in zip(STEPS, steps, strict=True)
    ]  # fmt: skip
    return Finding(
        "tables",
        "The paper's tables",
        "What do the paper's steps and its models come to on this machine?",
        "The paper's tables of ablations and of end-to-end latency.",
        _answer(study, rows, steps),
        [
            Table("OPT-6.7B step by step, reads alone, theirs and then ours",
                  ["kept", "GB in DRAM", "GB a token", "GB/s", "ms", "ours: GB a token", "GB/s",
                   "ms"], ablation),
            Table("A token with half of the model in DRAM, 16 bits, theirs and then ours",
                  ["model", "all read, ms", "their ideas, ms", "times as fast",
                   "ours: all read, ms", "the plan, ms", "times as fast", "MB read"], rows),
        ],
        [
            Chart("How many times as fast as reading everything", "model", "times as fast",
                  {"the paper": [(float(i), float(row[3] or 0)) for i, row in enumerate(rows)],
                   "expected here": [(float(i), float(row[6] or 0)) for i, row in
                                     enumerate(rows)]},
                  kind="bars", labels=list(END_TO_END)),
        ],
    )  # fmt: skip


def _answer(study: Study, rows: list[list[Cell]], steps: list[Step]) -> list[str]:
    """The sentences that the tables come to."""
    gains = [float(row[6] or 0) for row in rows]
    return [
        f"On {study.profile.name} the plan expects these models to write {min(gains):.1f} to "
        f"{max(gains):.1f} times as fast as with everything read for each token; the paper "
        "measured 2.4 to 4.8 times.",
        f"Step by step the reads of a token of OPT-6.7B fall from {1e3 * steps[0].seconds:,.0f} to "
        f"{1e3 * steps[-1].seconds:,.0f} ms; in the paper from 2,196 to 87.",
        "Ours are expectations of the cost model for synthetic models of these shapes: 3 % of "
        "their neurons fire, and after five tokens 2.4 % of a layer is new, as the paper found for "
        "OPT-6.7B. Falcon, Phi-2 and Llama 2 are taken with a ReLU, as the paper took them.",
        "What differs: the paper computed on an M1 Max with a disk that streams at 6.1 GB/s; here "
        "the profile's disk and threads are counted. Its predictors named 10 % of a layer, where "
        "those of a synthetic model name little more than what fires. Its window forgets what five "
        "tokens did not use; the plan fills the memory that there is, reads before a layer's turn "
        "and computes meanwhile.",
    ]


def _steps(study: Study, bundle: Bundle) -> Iterator[Step]:
    """The paper's steps: its disk's time for what a token reads. Units are read one by one."""
    profile, layers = study.profile, len(bundle.config.layers)
    record, units = bundle.record(0), bundle.config.layers[0].ffn.units
    size, stream = bundle.nbytes, profile.stream_speed(8 << 20)
    yield Step(size, size / stream)
    yield Step(size / 2, size / 2 / stream)
    if record is None:
        return
    fresh = record.window_rows[WINDOW] - record.window_rows[WINDOW - 1]
    bundle_bytes = bundle.unit_bytes(0)
    for units_read, parts in ((record.predicted * units, 2), (fresh, 2), (fresh, 1)):
        each = one_piece(bundle_bytes // parts, 4096)
        nbytes, requests = expected_reads(parts * units_read, parts * units, each, -1)
        yield Step(layers * nbytes, layers * profile.batch_seconds(requests, nbytes))


def _end_to_end(study: Study, bundle: Bundle, name: str, theirs: tuple[int, int]) -> list[Cell]:
    """A row of the second table."""
    size = bundle.nbytes
    everything = expected(study, bundle, 2 * size, neurons="dense").total
    naive = everything + size / study.profile.stream_speed(8 << 20)
    ours = expected(study, bundle, size // 2)
    return [name, *theirs, theirs[0] / theirs[1], 1e3 * naive, 1e3 * ours.total,
            naive / ours.total, ours.bytes / 1e6]  # fmt: skip
