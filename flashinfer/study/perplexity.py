"""How well a model foretells a text: what thresholds and missed neurons cost, in figures."""

import numpy as np

from flashinfer.formats.errors import UserError
from flashinfer.generation.sampling import refuse_infinite

SEQUENCE = 1024  # tokens that are foretold from those before them, and then begun anew
PIECE = 64  # that go through the layers together
LOGIT_ROWS = 16  # to ask ``Model.open`` for: of these the logits are in memory together


def evaluate(model, token_ids, progress=lambda done, total: None):
    """The mean negative log-likelihood, in nats a token, of a text with an open Model.

    The text is cut into sequences as long as the context; the first token of each is given.
    Returns (nats, tokens foretold). Raises UserError where the text is too short, or the model
    gives logits that are not finite.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    length = model.plan.context
    if len(ids) < 2 or length < 2:
        raise UserError("a text of at least 2 tokens is needed")
    total, count = 0.0, 0
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
            progress(start + first + len(piece), len(ids))
    return total / count, count


def _nats(logits, following, first):
    """The negative log-likelihood of tokens (n,) by logits (n, vocab_size) float32, those after the
    tokens numbered from ``first`` on."""
    for i, row in enumerate(logits):
        refuse_infinite(row, first + i)
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    chosen = exact[np.arange(len(following)), following]
    np.exp(exact, out=exact)
    return float((np.log(exact.sum(axis=1)) - chosen).sum())
