"""Draw the figures of docs/course: what each chapter is about, measured on the demo model.

    python -m bench.course_figures [DIR]

Each is an SVG of its own, light and dark as the reader's page is.
"""

import argparse
import html
from pathlib import Path

import numpy as np

from bench.cache_policies import misses
from flashinfer.calibration.predictor_training import svd_predictors
from flashinfer.cli.run import demo_model
from flashinfer.course import chapters
from flashinfer.course.chapters.predicting import layers_of
from flashinfer.course.engine import opened, run, text
from flashinfer.course.lesson import Answer
from flashinfer.formats.bundle.calibration import CAPACITIES
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.progress import no_progress
from flashinfer.generation.pace import tokens_expected
from flashinfer.plan.options import Options
from flashinfer.plan.profile import boards, load
from flashinfer.study.activity import Sample, Study
from flashinfer.study.charts import COLOURS, HEIGHT, MARKERS, WIDTH, svg
from flashinfer.study.experiments import windows
from flashinfer.study.findings import Chart
from flashinfer.study.optimal import Recorded
from flashinfer.study.page import STYLE

KEY = 22  # pixels of a line of names above a chart


def alone(chart):
    """The chart as a file: the names of its series above it, and a style of its own."""
    names, x, y = [], 64.0, KEY - 7
    for number, name in enumerate(chart.series if len(chart.series) > 1 else ()):
        width = 26 + 6.6 * len(name)
        if x + width > WIDTH:
            x, y = 64.0, y + KEY
        names.append(
            f'<path class="s{number % COLOURS}" transform="translate({x:.0f} {y - 4})" '
            f'd="{MARKERS[number % len(MARKERS)]}"/>'
            f'<text x="{x + 9:.0f}" y="{y}">{html.escape(name)}</text>'
        )
        x += width
    top = y + 7 if names else 0
    inner = svg(chart).partition(">")[2].removesuffix("</svg>")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + top}" '
        f'width="{WIDTH}" height="{HEIGHT + top}" role="img" aria-labelledby="title">'
        f'<title id="title">{html.escape(chart.title)}</title><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="var(--paper)"/>{"".join(names)}'
        f'<g transform="translate(0 {top})">{inner}</g></svg>\n'
    )


def bundling():
    """What a token's missing neurons cost to read, apart and bundled."""
    rows, width = 100, 8192  # neurons, bytes of each part
    names = list(boards())
    profiles = [load(path) for path in boards().values()]
    apart = [1e3 * p.batch_seconds(2 * rows, 2 * rows * width) for p in profiles]
    bundled = [1e3 * p.batch_seconds(rows, 2 * rows * width) for p in profiles]
    return Chart(
        "Reading 100 neurons of a model as wide as Llama 7B in 16 bits", "", "milliseconds",
        {"two rows, two reads": list(enumerate(apart)),
         "bundled, one read": list(enumerate(bundled))},
        kind="bars", labels=names,
    )  # fmt: skip


def placing():
    """What a window holds, and what each token still needs."""
    study = Study(Path(demo_model()), [Sample("text", text(0, 512))],
                  Options(draft="off"), load(boards()["rpi5-nvme"]), no_progress)  # fmt: skip
    return windows.run(study).charts[0]


def predicting():
    """Neurons named by rank, and by what the SVD is taken of."""
    layers, others = layers_of(text(0, 2048)), layers_of(text(2304, 512))
    named = {"the SVD of up": [], "of what up makes of the inputs": []}
    for rank in (8, 16, 32, 64, 96, 120):
        for name, points in named.items():
            shares = [
                share_named(layer, other, rank, name == "the SVD of up")
                for layer, other in zip(layers, others, strict=True)
            ]
            points.append((rank, 100 * float(np.mean(shares))))
    return Chart("What a predictor names that misses 5 % of the neurons that fire", "rank",
                 "% of all neurons named", named)  # fmt: skip


def share_named(layer, other, rank, plain):
    """The share of a layer's neurons that a predictor of this rank, made on ``layer``'s inputs,
    names on ``other``'s, if it may miss one in twenty that fire there."""
    if plain:
        u, s, v = np.linalg.svd(layer.up, full_matrices=False)
        a, b, bias = v[:rank], u[:, :rank] * s[:rank], layer.bias
    else:
        *_, maps = svd_predictors(layer.x, lambda: [(0, layer.up)], layer.bias, (rank,), unlike=0.0)
        a, b, bias = maps
    scores = other.x @ a.T @ b.T + bias
    fires = other.x @ layer.up.T + layer.bias > 0
    return float((scores > np.quantile(scores[fires], 0.05)).mean()) if fires.any() else 0.0


def merging():
    """Requests and bytes of a token by the gap that is read over."""
    series = {"reads a token": [], "kB a token": []}
    for gap in (-1, 0, 512, 1024, 2048, 4096, 8192, 16384, 32768):
        with opened() as model:
            model.flash.gap_bytes = gap
            found = run(model, text())
        series["reads a token"].append((max(gap, 0), found.reads))
        series["kB a token"].append((max(gap, 0), found.nbytes / 1e3))
    series = {name: points[1:] for name, points in series.items()}
    return Chart(
        "Reads and bytes by the gap that is read over", "bytes of gap", "of a token", series
    )


def traces(tokens=512):
    """What each layer's tokens use, [layer][token] Selection, and the units of a layer."""
    with opened(neurons="predicted") as model:
        caches = [layer.feed_forward.store.cache for layer in model.layers]
        recorded = [Recorded(len(cache.slot_of)) for cache in caches]
        for cache, priority in zip(caches, recorded, strict=True):
            cache.priority = priority
        for first in range(0, tokens, 256):
            model.reset()
            for token in text(first, 256):
                model.forward([token])
        return [each.trace for each in recorded], len(caches[0].slot_of)


def foreseeing():
    """Misses by the size of the cache and by what it drops."""
    found, units = traces()
    largest = max(len(selection.units) for trace in found for selection in trace)
    series = {}
    for policy in ("window", "lru", "frecency", "optimal"):
        points = []
        for share in (0.25, 0.375, 0.5, 0.625, 0.75, 0.875):
            slots = int(share * units)
            if slots < largest and policy != "optimal":
                continue
            missed = sum(misses(trace, units, slots, policy) for trace in found)
            points.append((100 * share, missed))
        series[policy] = points
    return Chart("Neurons that a token reads, by the slots of the caches",
                 "% of all neurons in DRAM", "neurons read a token", series)  # fmt: skip


def prefetching():
    """What guesses of several boldness read late, and for nothing."""
    series = {"read late": [], "read for nothing": []}
    for least in (-4, -2, -1, -0.5, 0, 0.5, 1, 2, 4):

        def guess(scores, least=least):
            return np.flatnonzero(scores > least)

        _, late, useless = chapters.prefetching.counted(text(), Answer(guess, Path(__file__)))
        for name, count in zip(series, (late, useless), strict=True):
            series[name].append((least, count))
    return Chart("Neurons read late and for nothing, by the score that a guess asks for",
                 "least score", "neurons a token", series)  # fmt: skip


def planning():
    """The miss curves of the demo model's layers."""
    with Bundle(demo_model()) as bundle:
        records = [bundle.record(i) for i in range(len(bundle.config.layers))]
        units = bundle.config.layers[0].ffn.units
    series = {
        f"layer {i}": [(c * units, m) for c, m in zip(CAPACITIES, record.misses, strict=True)][1:]
        for i, record in enumerate(records)
    }
    return Chart(
        "What a layer's cache misses, by its slots", "slots", "neurons missed a token", series
    )


def drafting():
    """Tokens that a pass gives, by how often a drafted token is right."""
    shares = [i / 20 for i in range(20)]
    series = {
        f"{n} drafted": [(share, tokens_expected(share, n)) for share in shares]
        for n in (1, 2, 4, 8, 16)
    }
    return Chart("Tokens of a pass", "how often a drafted token is right", "tokens", series)


FIGURES = (bundling, placing, predicting, merging, foreseeing, prefetching, planning, drafting)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", nargs="?", default="docs/course", type=Path)
    args = parser.parse_args()
    for number, figure in enumerate(FIGURES, 1):
        path = args.dir / f"{number}-{figure.__name__}.svg"
        path.write_text(alone(figure()), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
