"""How well a model predicts a text: the cost of thresholds and missed neurons, in figures."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flashinfer.formats.arrays import Float32Array, Float64Array, Int64Array
from flashinfer.formats.errors import UserError
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.generation.sampling import refuse_infinite
from flashinfer.model import Model

SEQUENCE = 1024  # tokens of a text that are read in one context; the next sequence begins anew
PIECE = 64  # tokens that go through the layers together
LOGIT_ROWS = 16  # tokens whose logits are in memory together, for ``Model.open``'s ``logit_rows``


class Prediction(NamedTuple):
    """What a model says after some tokens of a text, and what follows them.

    first      the number in the text of the token that gave the first row
    logits     (n, vocab_size) float32, all finite
    following  (n,): the token that follows each
    """

    first: int
    logits: Float32Array
    following: Int64Array


def predictions(
    model: Model, token_ids: Sequence[int], progress: Progress = no_progress, work: str = "evaluate"
) -> Iterator[Prediction]:
    """Yield the Predictions of a text, some rows at a time.

    progress  is told the tokens predicted, as ``work``
    The text is cut into sequences as long as the model's context. The first token of a sequence is
    given, and each of the others is predicted from those before it. Raises UserError where the text
    is too short, or the model gives logits that are not finite.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    length = model.plan.context
    if len(ids) < 2 or length < 2:
        raise UserError("a text of at least 2 tokens is needed")
    count, all_of_them = 0, len(ids) - -(-len(ids) // length)
    for start in range(0, len(ids) - 1, length):
        part = ids[start : start + length]
        model.reset()
        for first in range(0, len(part) - 1, PIECE):
            begin = first
            for logits in model.forward_in_pieces(part[first : first + PIECE]):
                following = part[begin + 1 : begin + 1 + len(logits)]
                if len(following):
                    yield _finite(start + begin, logits[: len(following)], following)
                begin += len(logits)
                count += len(following)
            progress(work, count, all_of_them)


def _finite(first: int, logits: Float32Array, following: Int64Array) -> Prediction:
    for i, row in enumerate(logits):
        refuse_infinite(row, first + i)
    return Prediction(first, logits, following)


def evaluate(
    model: Model, token_ids: Sequence[int], progress: Progress = no_progress
) -> tuple[float, int]:
    """The mean negative log-likelihood of a text, in nats per token, and the tokens it is over.

    Cuts the text and raises UserError as ``predictions`` does.
    """
    total, count = 0.0, 0
    for found in predictions(model, token_ids, progress):
        for row, token in zip(found.logits, found.following, strict=True):
            total -= float(log_softmax(row)[token])
        count += len(found.following)
    return total / count, count


def log_softmax(logits: Float32Array | Float64Array) -> Float64Array:
    """logits (vocab_size,), finite -> the logarithms of the probabilities, in float64."""
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    return exact
