"""What tokens use together: several tokens of a text in one pass, and tokens of several texts."""

import numpy as np

from flashinfer.plan.setup import opened, prepare
from flashinfer.study.activity import Study, Used, activity
from flashinfer.study.findings import Cell, Chart, Finding, Table, percent

TEXTS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SAMPLES = 16  # of each number of tokens


def run(study: Study) -> Finding:
    """The Finding of the study's first text."""
    layers = list(activity(study, study.samples[0], "batches"))
    tokens = layers[0].tokens
    in_a_row = {n: mean_union(layers, n, apart=False) for n in LENGTHS if n <= tokens // 2}
    of_texts = {n: mean_union(layers, n, apart=True) for n in TEXTS if n <= tokens // 8}
    with opened(study.path, study.options) as bundle:
        setup = prepare(bundle, study.options)
        setup.flash.close()
    rows: list[list[Cell]] = []
    speeds: dict[int, float] = {}
    for n in sorted(in_a_row.keys() | of_texts.keys()):
        seconds = None if setup.pass_seconds is None else setup.pass_seconds(n)
        if seconds is not None:
            speeds[n] = n / seconds
        rows.append([n, in_a_row.get(n), of_texts.get(n), seconds and 1e3 * seconds,
                     seconds and n / seconds])  # fmt: skip
    few = max(n for n in of_texts if n <= 16)
    answer = [
        f"One token uses {percent(in_a_row[1])} of the units. {few} tokens in a row use "
        f"{percent(in_a_row[few])} together and {few} tokens of different places "
        f"{percent(of_texts[few])}: {few * in_a_row[1] / of_texts[few]:.1f} times fewer bytes a "
        "token, even where texts have nothing in common.",
    ]
    if speeds:
        answer.append(
            f"The plan for {setup.plan.budget / 2**20:,.0f} MiB expects {speeds[1]:.3g} tokens/s "
            f"one at a time and {speeds[few]:.3g} with {few} in a pass."
        )
    charts = [
        Chart("Units that tokens use together", "tokens in a pass", "share of the units",
              {"in a row": [(float(n), share) for n, share in in_a_row.items()],
               "of different texts": [(float(n), share) for n, share in of_texts.items()],
               "if each were independent": [
                   (float(n), float(1 - (1 - in_a_row[1]) ** n)) for n in in_a_row]},
              log_x=True),
    ]  # fmt: skip
    if speeds:
        charts.append(
            Chart("Expected throughput", "tokens in a pass", "tokens/s",
                  {"plan": [(float(n), speed) for n, speed in speeds.items()]}, log_x=True)
        )  # fmt: skip
    return Finding(
        "batches",
        "Batches and lengths: what tokens share",
        "Does sparsity survive when many tokens are computed together, and what does a token cost "
        "then?",
        "The paper's third open question: batch sizes and prompts beyond one token.",
        answer,
        [
            Table("By tokens in a pass",
                  ["tokens", "share used, in a row", "share used, of different texts",
                   "expected ms a pass", "expected tokens/s"], rows)
        ],
        charts,
    )  # fmt: skip


def mean_union(layers: list[Used], n: int, apart: bool) -> float:
    """The share of the units that n tokens use together: in a row or, ``apart``, drawn from all
    over the text."""
    random = np.random.default_rng(n)
    used, units = 0.0, sum(layer.units for layer in layers)
    for layer in layers:
        by_token = layer.by_token(0, layer.tokens)
        for _ in range(SAMPLES):
            if apart:
                tokens = random.choice(layer.tokens, n, replace=False)
            else:
                tokens = random.integers(0, layer.tokens - n + 1) + np.arange(n)
            used += np.count_nonzero(by_token[tokens].any(axis=0))
    return used / (SAMPLES * units)
