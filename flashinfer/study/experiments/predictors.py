"""How well low-rank predictors name the neurons that fire: by rank, by layer, on other texts, and
what their errors cost."""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import replace

import numpy as np

from flashinfer.calibration.calibrate import up_projection
from flashinfer.calibration.predictor_training import (
    Found,
    Observations,
    count,
    judge,
    svd_predictors,
    train,
)
from flashinfer.formats.errors import UserError
from flashinfer.paper.feedforward import FeedForward
from flashinfer.study.activity import SEQUENCE, Sample, Study, activity
from flashinfer.study.findings import Cell, Chart, Finding, Point, Table, percent
from flashinfer.study.modes import compare_modes

MISSED = 0.05  # of the neurons that fire, on held-out tokens of the first text
STEPS = 150  # of training
PERPLEXITY = 512  # tokens of each text

Named = dict[tuple[str, int], list[Found]]  # {(kind, rank): of each layer}


def run(study: Study) -> Finding:
    """The Finding of a study: predictors are made on its first text and tried on all."""
    with study.bundle() as bundle:
        if bundle.config.mixture or not bundle.config.sparse:
            raise UserError(
                f"{study.path}: predictors are for neurons that a ReLU leaves silent, which this "
                "model does not have"
            )
        predicts = bundle.has_predictors
    made = _made(study)
    elsewhere = {
        sample.name: _tried(study, sample, made) for sample in study.samples[1:]
    }  # fmt: skip
    own = study.samples[0].name
    rows: list[list[Cell]] = []
    for (kind, rank), layers in made.items():
        row: list[Cell] = [kind, rank, _mean(layers, "predicted"), _mean(layers, "active"),
                           _mean(layers, "missed")]  # fmt: skip
        row += [_mean(tried[kind, rank], "missed") for tried in elsewhere.values()]
        rows.append(row)
    best = min(made, key=lambda key: _mean(made[key], "predicted") * (1 + key[1] / 1000))
    texts = {own: made[best], **{name: tried[best] for name, tried in elsewhere.items()}}
    answer = [
        f"A predictor that misses at most {percent(MISSED)} of the neurons that fire in held-out "
        f"tokens of {own} names {percent(_mean(made[best], 'predicted'))} of a layer's neurons, of "
        f"which {percent(_mean(made[best], 'active'))} fire ({best[0]}, rank {best[1]}).",
    ]
    if elsewhere:
        said = "; ".join(
            f"{name} {percent(_mean(tried[best], 'missed'))}" for name, tried in elsewhere.items()
        )
        answer.append(f"The same predictors on texts of another kind miss: {said}.")
    tables = [
        Table(f"Made on {own}: means of all layers",
              ["kind", "rank", "share predicted", "share that fires", f"missed, {own}",
               *(f"missed, {name}" for name in elsewhere)], rows)
    ]  # fmt: skip
    if predicts:
        tables.append(_perplexities(study))
        answer.append(
            "What the model's own predictors cost in perplexity stands in the last table, beside "
            "the same with exactly the neurons that fire."
        )
    return Finding(
        "predictors",
        "Predictors: naming the neurons that fire",
        "How large must a predictor be, does training beat the SVD, and does it hold on texts that "
        "it was not made on?",
        "Section 3.1: low-rank predictors; the summary's next check of their robustness.",
        answer,
        tables,
        [
            Chart(f"Missed by layer ({best[0]}, rank {best[1]})", "layer",
                  "share of the neurons that fire",
                  {name: [(float(i), one.missed) for i, one in enumerate(layers)]
                   for name, layers in texts.items()}),
            Chart(f"Predicted by rank, at {percent(MISSED)} missed", "rank",
                  "share of the layer's neurons", _by_rank(made), log_x=True),
        ],
    )  # fmt: skip


def _made(study: Study) -> Named:
    """Predictors of each kind and rank, of each layer, made on the study's first text."""
    made: Named = {}
    for ffn, observed in _observed(study, study.samples[0]):
        fit, *held_out = observed.split()
        for maps in svd_predictors(observed.x[fit], *up_projection(ffn)):
            svd = judge(maps, observed, held_out, MISSED)
            random = np.random.default_rng(0)
            trained = judge(train(svd, observed, fit, STEPS, random), observed, held_out, MISSED)
            made.setdefault(("SVD", len(maps.a)), []).append(svd)
            made.setdefault(("trained", len(maps.a)), []).append(trained)
    layers = max(len(found) for found in made.values())
    return {key: found for key, found in made.items() if len(found) == layers}


def _tried(study: Study, sample: Sample, made: Named) -> Named:
    """The same predictors' figures on all tokens of another text."""
    tried: Named = {key: [] for key in made}
    for number, (_, observed) in enumerate(_observed(study, sample)):
        every = [np.arange(len(observed.x))]
        for key, layers in made.items():
            tried[key].append(count(copy(layers[number]), observed, every))
    return tried


def _observed(study: Study, sample: Sample) -> Iterator[tuple[FeedForward, Observations]]:
    """(FFN, Observations) of each layer along a text."""
    for layer in activity(study, sample, "predictors", inputs=True):
        assert layer.x is not None and layer.ffn is not None
        starts = np.arange(0, layer.tokens, min(SEQUENCE, layer.tokens))
        yield layer.ffn, Observations(layer.x, layer.bits, starts)


def _perplexities(study: Study) -> Table:
    """The modes of a calibrated bundle on each text."""
    rows: list[list[Cell]] = []
    for sample in study.samples:
        options = replace(study.options, neurons=None)
        found = compare_modes(study.path, list(sample.ids[:PERPLEXITY]), options)
        dense, predicted, ideal = (math.exp(one.perplexity.nats_per_token)
                                   for one in found.results)  # fmt: skip
        missed = float(np.mean([layer.missed for layer in found.layers]))
        rows.append([sample.name, dense, ideal, predicted, predicted / dense - 1, missed])
    return Table(
        "The model's own predictors",
        ["text", "perplexity, all neurons", "those that fire", "those predicted", "more by",
         "missed"], rows,
    )  # fmt: skip


def _mean(layers: list[Found], name: str) -> float:
    return float(np.mean([getattr(one, name) for one in layers]))


def _by_rank(made: Named) -> dict[str, list[Point]]:
    kinds: dict[str, list[Point]] = {}
    for (kind, rank), layers in made.items():
        kinds.setdefault(kind, []).append((float(rank), _mean(layers, "predicted")))
    return kinds
