"""What it would save to store neurons beside those that they fire with."""

from collections.abc import Iterator

import numpy as np

from flashinfer.calibration.coactivation import path, places_of, read_together
from flashinfer.formats.arrays import Int64Array
from flashinfer.study.activity import Study, Used, activity
from flashinfer.study.findings import Chart, Finding, Table

WINDOW = 5  # tokens whose neurons are in DRAM
EVALUATED = 256  # tokens, of the half of the text that the layouts were not made from


def run(study: Study) -> Finding:
    """The Finding of the study's first text."""
    layers = list(activity(study, study.samples[0], "coactivation"))
    gap = study.profile.gap_bytes(layers[0].nbytes)
    sums: dict[str, np.ndarray] = {}
    for layer in layers:
        half = layer.tokens // 16 * 8
        together = cooccurrence(layer, half)
        for name, order in layouts(layer, half, together):
            found = np.mean(list(costs(study, layer, half, order, gap)), axis=0)
            sums[name] = sums.get(name, 0.0) + found
    base = sums["as trained"]
    rows = [
        [name, *figures.tolist(), base[2] / figures[2] if figures[2] else None]
        for name, figures in sums.items()
    ]
    best = min(sums, key=lambda name: sums[name][2])
    path = sums[PATH]
    answer = [
        f"With neurons along one path through those that fire together a token takes "
        f"{path[1]:.3g} reads instead of {base[1]:.3g}, {1e3 * path[2]:.3g} ms instead of "
        f"{1e3 * base[2]:.3g} on {study.profile.name}: {base[2] / path[2]:.2f} times as fast. The "
        f"fastest of these layouts is: {best}.",
        f"Reading each neuron's closest friend with it, which the paper tried and gave up, takes "
        f"{sums[FRIENDS][2] / base[2]:.2f} times as long: the busiest neurons are friends of many.",
        "Layouts were made from the first half of the text and judged on the second; what the last "
        f"{WINDOW} tokens used is in DRAM and is not read.",
    ]
    return Finding(
        "coactivation",
        "Co-activation: neurons that fire together",
        "Does it pay to store neurons beside those that they fire with, so that one read brings "
        "several?",
        "The paper's section on bundling by co-activation, which it gave up; Neuralink found 1.8 "
        "times the bandwidth.",
        answer,
        [Table("Reads of a token, all layers",
               ["layout", "bytes", "reads", "seconds", "times as fast"], rows)],
        [Chart("Reads of a token by layout", "layout", "milliseconds",
               {"reads": [(float(i), 1e3 * figures[2]) for i, figures in
                          enumerate(sums.values())]}, kind="bars", labels=list(sums))],
    )  # fmt: skip


PATH, FRIENDS = "path", "with friends"


def cooccurrence(layer: Used, tokens: int) -> np.ndarray:
    """How many of the first ``tokens`` tokens used both of two units, (units, units) float32."""
    used = layer.by_token(0, tokens).astype(np.float32)
    together: np.ndarray = used.T @ used
    return together


def layouts(layer: Used, tokens: int, together: np.ndarray) -> Iterator[tuple[str, Int64Array]]:
    """(name, places (units,) of the units in the file) of each layout; of FRIENDS as trained, with
    a unit's friend in the second row."""
    units = np.arange(layer.units)
    yield "as trained", units
    yield "hottest first", places_of(np.argsort(-np.diagonal(together), kind="stable"))
    yield PATH, places_of(path(layer.bits[:, : tokens // 8]))
    apart = together.copy()
    np.fill_diagonal(apart, -1)
    yield FRIENDS, np.stack([units, apart.argmax(axis=1)])


def costs(
    study: Study, layer: Used, first: int, layout: Int64Array, gap: int
) -> Iterator[tuple[float, float, float]]:
    """Yield (bytes, reads, seconds) of the tokens from ``first`` on, which read what the last
    WINDOW tokens did not use."""
    used = layer.by_token(first, layer.tokens)[: EVALUATED + WINDOW]
    for token in range(WINDOW, len(used)):
        rows = np.flatnonzero(used[token] & ~used[token - WINDOW : token].any(axis=0))
        if layout.ndim == 2:  # each with its friend, whether that is there or not
            found = read_together(rows, 2 * layer.nbytes, gap)
        else:
            found = read_together(np.sort(layout[rows]), layer.nbytes, gap)
        seconds = study.profile.batch_seconds(found.reads, found.nbytes) if len(rows) else 0.0
        yield found.nbytes, found.reads, seconds
