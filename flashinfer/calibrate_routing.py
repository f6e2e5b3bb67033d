"""Finding out which experts of a mixture a text uses, for the plan, the cache and a warm start.

Layer by layer, as in ``calibrate``: each expert is read once.
"""

import numpy as np

from flashinfer.traces import guessed, largest, routing_record


def tokens_that_fit(config, budget):
    """Tokens whose states and choices fit a third of the budget."""
    return max(0, budget // 3 // (6 * config.hidden_size * 4 + 9 * config.experts))


def routing(model, ids, sequence, progress):
    """The records of a Model's layers along the tokens ``ids``, ``sequence`` of them at a time.

    Each also holds "guessed": the share of its experts that its router, asked one layer early,
    named (0 for the first layer), and "surest": the share of its surest half that was right.
    """
    starts = np.arange(0, len(ids), sequence)
    h = np.concatenate([model.embed(ids[s : s + sequence]) for s in starts])  # (N, d_model)
    total, records, early = len(model.layers), [], None
    for number, layer in enumerate(model.layers):
        progress(number, total)
        x, residual = np.empty_like(h), np.empty_like(h)
        for start in starts:
            span = slice(start, start + sequence)
            h[span], x[span], residual[span] = model.attend(layer, h[span])
        ffn = layer.feed_forward
        scores = ffn.predictor.scores(x)
        uses = largest(scores, ffn.predictor.per_token)
        records.append({**routing_record(uses), **guessed(uses, early)})
        if number + 1 < total:
            following = model.layers[number + 1]
            early = following.feed_forward.predictor.scores(model.early_input(following, h)[0])
        h = model.add_feed_forward(layer, h, ffn(x, 0, residual))
    progress(total, total)
    return records
