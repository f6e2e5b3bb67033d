"""A model's modes over the same tokens: what prediction costs, and how much of it is the
predictor's fault.

Dense is the model as it was trained. Ideal prediction uses exactly the neurons that fire, so what
it is away from dense is the cost of the thresholds that calibration has put in (none for a ReLU).
What predicted is away from dense beyond that is the cost of the neurons that the predictor misses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.model import Model
from flashinfer.plan.options import Mode, Options
from flashinfer.plan.setup import opened, prepare
from flashinfer.study.divergence import Comparison, Distance, Perplexity, perplexity_of
from flashinfer.study.ideal import Watched, predict_ideally, watch
from flashinfer.study.perplexity import LOGIT_ROWS, log_softmax, predictions
from flashinfer.study.scratch import ScratchLogits

IDEAL = "ideal"


@dataclass(frozen=True)
class ModeResult:
    """A mode over a text: "dense", "predicted", "routed" or "ideal", and its ``distance`` from
    dense, which dense has none of."""

    mode: str
    perplexity: Perplexity
    distance: Distance | None


@dataclass(frozen=True)
class LayerErrors:
    """Of a layer's predictor along a text, its inputs those of the predicted mode.

    active    share of the neurons that fire
    missed    share of those that fire that are not predicted
    needless  share of those that are predicted that do not fire
    """

    active: float
    missed: float
    needless: float


@dataclass(frozen=True)
class Modes:
    """All modes that a bundle has, over ``tokens`` predicted tokens.

    results   of each mode, the one that others are compared with first
    layers    the predictors' errors; empty where nothing is predicted
    left_out  why there are no more modes; None where all are there
    """

    tokens: int
    results: list[ModeResult]
    layers: list[LayerErrors]
    left_out: str | None


def compare_modes(
    path: Path | str,
    token_ids: Sequence[int],
    options: Options,
    progress: Progress = no_progress,
) -> Modes:
    """Run a text in each mode of a bundle, one after the other, each within the memory budget.

    options   Options; its ``neurons`` is left out of account
    progress  is told what ``Model.open`` tells, and the tokens predicted as the mode's name
    The base's logits go through a temporary file of 4 bytes for each token and entry of the
    vocabulary. Raises UserError as ``predictions`` does, and where there is no room for the file;
    BudgetError where the memory is too little. That is found before any mode is run, but for the
    few MB that a process keeps of the modes before.
    """
    options = replace(options, logit_rows=LOGIT_ROWS, neurons=None)
    with opened(path, options) as bundle:
        left_out, vocab_size = _left_out(bundle), bundle.config.vocab_size
        if left_out is None:  # The mode that needs more memory: too little is refused at once.
            prepare(bundle, replace(options, neurons="predicted")).flash.close()
    if left_out is not None:
        return _only_mode(path, token_ids, options, left_out, progress)
    with ScratchLogits((len(token_ids), vocab_size)) as base:
        run = _Run(path, token_ids, options, base, progress)
        run.dense()
        predicted, layers = run.predicted()
        ideal = run.ideal()
    results = [
        ModeResult("dense", predicted.base, None),
        ModeResult("predicted", perplexity_of(predicted.nats), predicted.distance()),
        ModeResult(IDEAL, perplexity_of(ideal.nats), ideal.distance()),
    ]
    return Modes(len(predicted.nats), results, layers, None)


@dataclass(frozen=True)
class _Run:
    """The modes of a bundle one after the other. Each opens a model of its own, which is gone when
    its method returns: the budget has room for one."""

    path: Path | str
    token_ids: Sequence[int]
    options: Options
    base: ScratchLogits
    progress: Progress

    def dense(self) -> None:
        """Write the logits that the others are compared with to ``base``."""
        with self._open("dense") as model:
            for found in predictions(model, self.token_ids, self.progress, "dense"):
                self.base.write(found.first, found.logits)

    def predicted(self) -> tuple[Comparison, list[LayerErrors]]:
        """The predicted mode beside dense, and the errors of each layer's predictor."""
        with self._open("predicted") as model:
            watched = watch(model)
            comparison = self._comparison(model, "predicted")
            return comparison, [errors_of(layer) for layer in watched]

    def ideal(self) -> Comparison:
        """Ideal prediction beside dense."""
        with self._open("predicted") as model:
            predict_ideally(model)
            return self._comparison(model, IDEAL)

    def _open(self, mode: Mode) -> Model:
        return Model.open(self.path, replace(self.options, neurons=mode), self.progress)

    def _comparison(self, model: Model, mode: str) -> Comparison:
        comparison = Comparison()
        for found in predictions(model, self.token_ids, self.progress, mode):
            rows = self.base.rows(found.first, len(found.logits))
            for of_base, row, token in zip(rows, found.logits, found.following, strict=True):
                comparison.add(of_base, row, int(token))
        return comparison


def _left_out(bundle: Bundle) -> str | None:
    """Why a bundle has one mode only; None where it has all."""
    if bundle.config.reads_experts:
        return (
            "the router of a mixture of experts knows what to use, so there is nothing to predict"
        )
    if bundle.has_predictors:
        return None
    if bundle.config.needs_all:
        return "the model's feed-forward networks are always used whole"
    if bundle.config.sparse:
        return "the model has no predictors; flashinfer calibrate makes them"
    return (
        "the model has no silent neurons, and no predictors; flashinfer calibrate "
        "--target-sparsity makes both"
    )


def _only_mode(
    path: Path | str, token_ids: Sequence[int], options: Options, left_out: str, progress: Progress
) -> Modes:
    """The Modes of a bundle that has one."""
    nats: list[float] = []
    with Model.open(path, options, progress) as model:
        mode = model.plan.mode
        for found in predictions(model, token_ids, progress, mode):
            for row, token in zip(found.logits, found.following, strict=True):
                nats.append(-float(log_softmax(row)[token]))
    return Modes(len(nats), [ModeResult(mode, perplexity_of(nats), None)], [], left_out)


def errors_of(watched: Watched) -> LayerErrors:
    """The LayerErrors that a Watched predictor has counted."""
    return LayerErrors(
        active=watched.fired / max(1, watched.tokens * watched.firing.tensor.rows),
        missed=watched.missed / max(1, watched.fired),
        needless=watched.needless / max(1, watched.named),
    )
