"""A model beside another engine, over the same tokens: the model is the base of the comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashinfer.formats.progress import Progress, no_progress
from flashinfer.model import Model
from flashinfer.study.divergence import Comparison, Distance, Perplexity
from flashinfer.study.other_logits import OtherLogits
from flashinfer.study.perplexity import predictions
from flashinfer.study.server import Server


@dataclass(frozen=True)
class Against:
    """What ``compare_logits`` and ``compare_server`` found.

    tokens    predicted tokens; base: the model's Perplexity
    other     the other engine's, None where a server did not name every token of the text
    distance  of the other engine from the model
    named     tokens that the server named after each token, on average; None: all of the vocabulary
    """

    tokens: int
    base: Perplexity
    other: Perplexity | None
    distance: Distance
    named: float | None


def compare_logits(
    model: Model, token_ids: Sequence[int], path: Path | str, progress: Progress = no_progress
) -> Against:
    """Compare a model with the logits (T, vocab_size) that another engine gave, in a file.

    path  a .npy, .npz or .safetensors file; several arrays: the one named "logits"
    The text is cut as ``perplexity.predictions`` does, and the other engine's logits have to come
    from the same sequences. Raises UserError.
    """
    comparison = Comparison()
    with OtherLogits(path, list(token_ids), model.config.vocab_size) as other:
        for found in predictions(model, token_ids, progress):
            rows = other.rows(found.first, len(found.logits))
            for base, row, token in zip(found.logits, rows, found.following, strict=True):
                comparison.add(base, row, int(token))
    return _result(comparison, None)


def compare_server(
    model: Model, token_ids: Sequence[int], server: Server, progress: Progress = no_progress
) -> Against:
    """Compare a model with what a server says of the same tokens.

    Only the tokens that the server names are told apart, so that KL divergence is a lower bound.
    Raises UserError where the server cannot be asked, or gives something else.
    """
    comparison, named = Comparison(), 0
    answers = server.answers(token_ids, model.plan.context)
    for found in predictions(model, token_ids, progress):
        for base, token in zip(found.logits, found.following, strict=True):
            ids, logs = next(answers)
            comparison.add_named(base, ids, logs, int(token))
            named += len(ids)
    return _result(comparison, named / len(comparison.kl))


def _result(comparison: Comparison, named: float | None) -> Against:
    return Against(
        len(comparison.kl), comparison.base, comparison.model, comparison.distance(), named
    )
