"""What tokens use together: several tokens of a text in one pass, and tokens of several texts."""

import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from flashinfer.formats.errors import BudgetError
from flashinfer.plan.setup import opened, prepare
from flashinfer.study.activity import Study, Used, activity
from flashinfer.study.findings import Cell, Chart, Finding, Table, percent

TEXTS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SAMPLES = 16  # of each number of tokens
PROMPT, WRITTEN = 8, 8  # tokens of each of several texts
TIMES = 3  # that a prompt is measured
LONGEST = 20.0  # seconds; what takes as long is the last that is measured


class Measured(NamedTuple):
    """How fast so many tokens of a prompt, or so many texts, are, and the bytes of a token."""

    tokens_per_second: float
    nbytes: float


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
    measured: list[list[Cell]] = []
    prompts, texts = dict(of_prompts(study)), dict(of_batches(study))
    for n in sorted(prompts.keys() | texts.keys()):
        row: list[Cell] = [n]
        for found in (prompts.get(n), texts.get(n)):
            row += [None, None] if found is None else [found.tokens_per_second, found.nbytes / 1e6]
        measured.append(row)
    few = max(n for n in of_texts if n <= 16)
    answer = [
        f"One token uses {percent(in_a_row[1])} of the units. {few} tokens in a row use "
        f"{percent(in_a_row[few])} together and {few} tokens of different places "
        f"{percent(of_texts[few])}: {few * in_a_row[1] / of_texts[few]:.1f} times fewer bytes a "
        "token, even where texts have nothing in common.",
    ]
    longest, most = max(prompts), max(texts)
    answer.append(
        f"Measured: a prompt of {longest:,} tokens goes through at "
        f"{prompts[longest].tokens_per_second:,.4g} tokens/s where one token alone reaches "
        f"{prompts[1].tokens_per_second:,.4g}, and {most} texts together are written at "
        f"{texts[most].tokens_per_second:,.4g} where one is at {texts[1].tokens_per_second:,.4g}."
    )
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
                   "expected ms a pass", "expected tokens/s"], rows),
            Table("Measured: prompts of so many tokens, and so many texts together",
                  ["tokens or texts", "prompt, tokens/s", "MB a token", "texts, tokens/s",
                   "MB a token"], measured),
        ],
        charts,
    )  # fmt: skip


def of_prompts(study: Study) -> Iterator[tuple[int, Measured]]:
    """Yield (tokens, Measured) of prompts as long as the first text and the context allow."""
    ids = study.samples[0].ids
    with study.open(draft="off") as model:
        for n in LENGTHS:
            if n > min(len(ids), model.plan.context):
                return
            seconds, before = [], model.flash.bytes_read
            for _ in range(TIMES):
                model.reset()
                begun = time.perf_counter()
                model.forward(ids[:n])
                seconds.append(time.perf_counter() - begun)
            nbytes = (model.flash.bytes_read - before) / (TIMES * n)
            yield n, Measured(n / statistics.median(seconds), nbytes)
            if sum(seconds) > LONGEST:
                return


def of_batches(study: Study) -> Iterator[tuple[int, Measured]]:
    """Yield (texts, Measured) of texts that are written together, as many as the memory allows."""
    ids = study.samples[0].ids
    for n in TEXTS:
        if n * PROMPT > len(ids):
            return
        prompts = [ids[PROMPT * i : PROMPT * (i + 1)] for i in range(n)]
        try:
            model = study.open(draft="off", texts=n, context=PROMPT + WRITTEN)
        except BudgetError:
            return
        with model:
            begun = time.perf_counter()
            for _ in model.generate_many(prompts, WRITTEN, 0.0, stop_at_eos=False):
                pass
            phase = model.stats.generation
            yield n, Measured(phase.tokens_per_second, phase.bytes_per_token)
            if time.perf_counter() - begun > LONGEST:
                return


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
