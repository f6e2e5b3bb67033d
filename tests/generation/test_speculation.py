"""Drafts change no token: whatever the model, the budget, the drafts and the sampling."""

import numpy as np
import pytest
from drafting import Anyhow, Known, drafting

from conftest import DATA, keep_rows
from flashinfer import BudgetError, Model, UserError
from flashinfer.formats.convert import convert
from flashinfer.generation.sampling import Sampler
from flashinfer.generation.speculation import drawn
from flashinfer.paper.neuron_cache import NEVER
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import config_like

PROMPT = [5, 7, 9, 5, 7]
SAMPLING = [{"temperature": 0}, {"temperature": 0.8, "seed": 3}, {"temperature": 3.0, "seed": 4}]


def written(path, n=40, drafter=None, seed=0, rows=None, window=None, sampling=None, **options):
    """(tokens, Model's stats) of a generation with drafts from the text, or from ``drafter``."""
    options = {"context": 48, **options}
    with Model.open(path, window=window, **options) as model:
        for layer in model.layers if rows else ():
            keep_rows(layer.feed_forward, rows, window)
        if options.get("draft") != "off":
            assert model.plan.drafts > 0
            drafting(model, drafter, seed)
        sampling = sampling or {"temperature": 0}
        return list(model.generate(PROMPT, n, stop_at_eos=False, **sampling)), model.stats


@pytest.fixture(scope="module", params=["opt", "windowed", "mixture", "gated"])
def bundle(request, tmp_path_factory):
    """A small model of each kind: predicted neurons, attention windows, experts, gated ReLU."""
    path = tmp_path_factory.mktemp("speculation") / "x.flash"
    small = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96,
             "ffn_dim": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
             "vocab_size": 50, "word_embed_proj_dim": 64}  # fmt: skip
    if request.param == "mixture":
        convert(DATA / "olmoe", path, "f32")
        return path
    name, own = {
        "opt": ("opt-125m", {}),
        "windowed": ("mistral-7b", {"sliding_window": 9}),
        "gated": ("tinyllama-1.1b", {"hidden_act": "relu"}),
    }[request.param]
    synthesize(path, {**config_like(name, 64), **small, **own})
    return path


@pytest.mark.parametrize("sampling", SAMPLING)
def test_drafts_change_no_token(bundle, sampling):
    expected, _ = written(bundle, draft="off", sampling=sampling)
    accepted = 0
    for seed, share in enumerate((0.0, 0.3, 0.8, 1.0)):
        known = Known([*PROMPT, *expected], share, seed)
        for options in ({}, {"rows": 5}, {"window": 2, "rows": 7}, {"threads": 3}):
            tokens, stats = written(bundle, drafter=known, seed=seed, sampling=sampling, **options)
            assert tokens == expected, (share, options)
            assert stats.generation.tokens == len(expected) - 1
            accepted += stats.drafts.accepted
    from_text, stats = written(bundle, sampling=sampling)
    assert from_text == expected
    assert accepted > 100


def test_drafts_change_no_token_in_any_budget(bundle, constant_rss):
    expected, _ = written(bundle, draft="off")
    known = Known([*PROMPT, *expected], 0.7)
    with pytest.raises(BudgetError) as caught:
        Model.open(bundle, memory=1, context=48)
    drafted = []
    for more in (0, 1, 4):
        with Model.open(bundle, memory=caught.value.least + (more << 20), context=48) as model:
            drafted.append(model.plan.drafts)
            drafting(model, known)
            assert list(model.generate(PROMPT, 40, 0, stop_at_eos=False)) == expected
    assert drafted == sorted(drafted) and drafted[-1] > 0


def test_an_early_stop_leaves_what_was_told(bundle):
    """As without drafts: the key/value cache holds all tokens told but the last."""
    expected, _ = written(bundle, draft="off")
    with drafting(Model.open(bundle, context=48), Known([*PROMPT, *expected], 1.0)) as model:
        for stop in (1, 2, 5, 17):
            model.pace.random = np.random.default_rng(stop)
            tokens = model.generate(PROMPT, 40, 0, stop_at_eos=False)
            told = [next(tokens) for _ in range(stop)]
            tokens.close()
            assert told == expected[:stop]
            assert model.ids == [*PROMPT, *told[:-1]]
            more = list(
                model.generate([*PROMPT, *told], 40 - stop, 0, stop_at_eos=False, reuse=True)
            )
            assert told + more == expected
            assert model.stats.prompt.tokens == 1


def test_an_end_of_text_within_a_draft_ends_it(bundle):
    expected, _ = written(bundle, draft="off")
    end = expected[11]
    with drafting(Model.open(bundle, context=48), Known([*PROMPT, *expected], 1.0)) as model:
        object.__setattr__(model.config, "eos_token_ids", frozenset({end}))
        tokens = list(model.generate(PROMPT, 40, 0))
    assert tokens == expected[: expected.index(end) + 1]


def test_a_failure_among_drafts_leaves_the_text(bundle, monkeypatch):
    expected, _ = written(bundle, draft="off")
    with drafting(Model.open(bundle, context=48), Known([*PROMPT, *expected], 0.8)) as model:
        tokens = model.generate(PROMPT, 40, 0, stop_at_eos=False)
        told = [next(tokens) for _ in range(9)]
        add = type(model.layers[-1]).add
        calls = iter(range(100))

        def failing(layer, h, y, given):
            if next(calls) == 4:
                raise OSError("a read failed")
            return add(layer, h, y, given)

        monkeypatch.setattr(type(model.layers[-1]), "add", failing)
        with pytest.raises(OSError, match="a read failed"):
            told += [next(tokens) for _ in range(31)]
        monkeypatch.undo()
        more = list(
            model.generate([*PROMPT, *told], 40 - len(told), 0, stop_at_eos=False, reuse=True)
        )
    assert told + more == expected


def test_rejected_drafts_count_for_nothing(synthetic):
    """A unit that only rejected drafts used has the worth and the last use that it had before."""
    before, ids = np.arange(3, 60), [5, 700, 9, 1200, 44, 90, 100, 1300, 8]
    units = np.arange(1024, dtype=np.int32)
    for window in (None, 30):
        with Model.open(synthetic, window=window) as model:
            caches = filled(model, before, window)
            one_by_one = [model.forward([token]) for token in ids]
            values = [cache.priority.values.copy() for cache in caches]
            uses, now = [cache.last_uses(units) for cache in caches], model.token - 1
        with Model.open(synthetic, window=window) as model:
            caches, at = filled(model, before, window), 0
            for accepted, wrong in ((0, 3), (2, 2), (1, 0), (2, 4)):
                draft = [*ids[at + 1 : at + 1 + accepted], *[333 + at + i for i in range(wrong)]]
                h = model._hidden(np.array([ids[at], *draft]), sure=1)
                rows = model.decoder.logits(h)
                model.passes.settle(model.text, len(draft), accepted)
                for row in range(1 + accepted):
                    assert np.array_equal(rows[row], one_by_one[at + row])
                at += 1 + accepted
            assert at == len(ids) and model.ids == [*before, *ids] and model.token - 1 == now
            for cache, expected, last in zip(caches, values, uses, strict=True):
                assert np.allclose(cache.priority.values, expected, rtol=1e-12)
                if window is not None:
                    found, recent = cache.last_uses(units), last > now - window
                    assert np.array_equal(found[recent], last[recent])
                    assert (found[~recent] <= now - window).all()


def filled(model, ids, window):
    """The neuron caches, of nearly all units, after a prompt."""
    for layer in model.layers:
        keep_rows(layer.feed_forward, 1000, window)
    model.forward(ids)
    return [layer.feed_forward.store.cache for layer in model.layers]


def test_drawn_stops_at_the_first_wrong_draft():
    rows = np.full((4, 9), -50, dtype=np.float32)
    for row, token in enumerate((3, 4, 5, 6)):
        rows[row, token] = 1
    assert drawn(Sampler(0), rows, [3, 4, 5], ()) == [3, 4, 5, 6]
    assert drawn(Sampler(0), rows, [3, 7, 5], ()) == [3, 4]
    assert drawn(Sampler(0), rows, [8, 4, 5], ()) == [3]
    assert drawn(Sampler(0), rows, [3, 4, 5], {4}) == [3, 4]
    rows[3] = np.nan  # after a wrong draft: nobody asks
    assert drawn(Sampler(0), rows, [3, 7, 5], ()) == [3, 4]
    with pytest.raises(UserError, match="no finite logits"):
        drawn(Sampler(0), rows, [3, 4, 5], ())


def test_a_copied_sampler_draws_with_the_same_numbers():
    sampler, logits = Sampler(1.0, seed=5), np.random.default_rng(0).standard_normal(40)
    logits = logits.astype(np.float32)
    [sampler(logits) for _ in range(3)]
    ahead = sampler.copy()
    assert [ahead(logits) for _ in range(20)] == [sampler(logits) for _ in range(20)]


def test_no_drafts_where_none_are_asked_for(bundle):
    with Model.open(bundle, context=48, draft="off") as model:
        assert model.plan.drafts == 0 and model.drafter is None
    with pytest.raises(UserError, match="no file and not one of auto, off, ngram"):
        Model.open(bundle, draft="nowhere")
    assert NEVER < 0 and Anyhow(3).may_draft
