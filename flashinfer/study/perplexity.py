"""How well a model predicts a text: the cost of thresholds and missed neurons, in figures."""

from collections.abc import Sequence

import numpy as np

from flashinfer.formats.arrays import Float32Array, Int64Array
from flashinfer.formats.errors import UserError
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.generation.sampling import refuse_infinite
from flashinfer.model import Model

SEQUENCE = 1024  # tokens of a text that are read in one context; the next sequence begins anew
PIECE = 64  # tokens that go through the layers together
LOGIT_ROWS = 16  # tokens whose logits are in memory together, for ``Model.open``'s ``logit_rows``


def evaluate(
    model: Model, token_ids: Sequence[int], progress: Progress = no_progress
) -> tuple[float, int]:
    """The mean negative log-likelihood of a text, in nats per token, and the tokens it is over.

    progress  is told the tokens predicted, as "evaluate"
    The text is cut into sequences as long as the model's context. The first token of a sequence is
    given, and each of the others is predicted from those before it. Raises UserError where the text
    is too short, or the model gives logits that are not finite.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    length = model.plan.context
    if len(ids) < 2 or length < 2:
        raise UserError("a text of at least 2 tokens is needed")
    total, count, all_of_them = 0.0, 0, len(ids) - -(-len(ids) // length)
    for start in range(0, len(ids) - 1, length):
        part = ids[start : start + length]
        model.reset()
        for first in range(0, len(part) - 1, PIECE):
            piece = part[first : first + PIECE]
            begin = first
            for logits in model.forward_in_pieces(piece):
                following = part[begin + 1 : begin + 1 + len(logits)]
                total += _nats(logits[: len(following)], following, start + begin)
                begin += len(logits)
                count += len(following)
            progress("evaluate", count, all_of_them)
    return total / count, count


def _nats(logits: Float32Array, following: Int64Array, first: int) -> float:
    """The negative log-likelihood of the tokens ``following`` (n,) by logits (n, vocab_size).

    first  the number in the text of the token that gave the first row of logits
    """
    for i, row in enumerate(logits):
        refuse_infinite(row, first + i)
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    chosen = exact[np.arange(len(following)), following]
    np.exp(exact, out=exact)
    return float((np.log(exact.sum(axis=1)) - chosen).sum())
