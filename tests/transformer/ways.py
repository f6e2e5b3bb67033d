"""Ways that a text takes through a model, none of which may change a bit, for any kind of mixer."""

import numpy as np
from drafting import Known, drafting
from hypothesis import strategies as st

from flashinfer import Model

CONTEXT = 48


def taken_back_anywhere(path, ids, expected, data):
    """Passes of any size, each followed by taking back any number of tokens."""
    with Model.open(path, context=CONTEXT, draft="ngram") as model:
        for _ in range(8):
            position = model.position
            n = data.draw(st.integers(0, 44 - position))
            if n:
                rows = model.forward(ids[position : position + n], every=True)
                assert np.array_equal(rows, expected[position : position + n])
            model.reset(data.draw(st.integers(0, model.position)))


def drafted(path, ids, share):
    """Drafts of which a ``share`` is right; returns the memories of the text."""
    with Model.open(path, context=CONTEXT, draft="off") as model:
        plain = list(model.generate(ids[:8], 36, temperature=0, stop_at_eos=False))
    with Model.open(path, context=CONTEXT, draft="ngram") as model:
        for seed in range(6):
            drafting(model, seed=seed)
            drafter = Known(ids[:8] + plain, share, seed, 96)
            found = list(
                model.generate(ids[:8], 36, temperature=0, stop_at_eos=False, drafter=drafter)
            )
            assert found == plain
        return model.text.caches


def share_passes(path, ids, **options):
    """Prompts some of which begin alike, so that memory is copied from text to text, too."""
    prompts = [ids[:9], ids[:12], ids[4:20], ids[:9] + ids[30:34], [5]]
    with Model.open(path, context=CONTEXT, draft="off", **options) as model:
        alone = [list(model.generate(p, 12, temperature=0, stop_at_eos=False)) for p in prompts]
    with Model.open(path, context=CONTEXT, texts=3, **options) as model:
        done = {w.request.number: w.token_ids for w in model.generate_many(
            prompts, 12, temperature=0, stop_at_eos=False)}  # fmt: skip
    assert [done[i] for i in range(len(prompts))] == alone
