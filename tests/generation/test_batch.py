"""Texts that share a pass: each is the one that it would be alone, whatever the others are."""

import numpy as np
import pytest

from conftest import DATA
from flashinfer import BudgetError, Model, UserError
from flashinfer.formats.convert import convert
from flashinfer.generation.batch import Request
from flashinfer.generation.sampling import Sampler
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import config_like

CONTEXT = 48


@pytest.fixture(scope="module", params=["opt", "windowed", "alibi", "mixture"])
def bundle(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("batch") / "x.flash"
    small = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96,
             "ffn_hidden_size": 96, "ffn_dim": 96, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 90,
             "word_embed_proj_dim": 64}  # fmt: skip
    if request.param == "mixture":
        convert(DATA / "olmoe", path, "f32")
        return path
    name, own = {
        "opt": ("opt-125m", {}),
        "windowed": ("mistral-7b", {"sliding_window": 9}),
        "alibi": ("falcon-7b", {"alibi": True}),
    }[request.param]
    synthesize(path, {**config_like(name, CONTEXT), **small, **own})
    return path


def requests_of(count, seed=1):
    """Requests of every length, many with a common beginning, each with settings of its own."""
    random = np.random.default_rng(seed)
    beginning = random.integers(3, 90, 30).tolist()
    found = []
    for number in range(count):
        own = random.integers(3, 90, random.integers(1, 9)).tolist()
        prompt = beginning[: random.integers(0, 31)] + own
        most = int(random.integers(1, CONTEXT + 2 - len(prompt)))
        temperature = float(random.choice([0.0, 0.8, 2.0]))
        found.append(Request(number, prompt, min(most, 20), Sampler(temperature, seed=number)))
    return found


def alone(path, requests, **options):
    """{number: the tokens of each request by itself}."""
    with Model.open(path, context=CONTEXT, draft="off", **options) as model:
        return {
            r.number: list(
                model.generate(
                    r.prompt, r.most, r.sampler.temperature, seed=r.number, stop_at_eos=False
                )
            )
            for r in requests
        }


def together(path, requests, **options):
    """The same, written together."""
    with Model.open(path, context=CONTEXT, **options) as model:
        found = {done.request.number: done.token_ids for done in model.write(requests)}
        return found, model.stats


@pytest.mark.parametrize("texts", [1, 2, 5, 16, 40])
def test_company_and_order_change_no_token(bundle, texts):
    expected = alone(bundle, requests_of(25))
    found, stats = together(bundle, requests_of(25), texts=texts)
    assert found == expected
    assert stats.generation.tokens == sum(map(len, expected.values()))
    backwards, _ = together(bundle, requests_of(25)[::-1], texts=texts, threads=3, window=2)
    assert backwards == expected


def test_budgets_change_no_token(bundle, constant_rss):
    expected = alone(bundle, requests_of(12))
    with pytest.raises(BudgetError) as caught:
        Model.open(bundle, memory=1, context=CONTEXT, texts=5)
    for more in (0, 1 << 20):
        memory = caught.value.least + more
        assert together(bundle, requests_of(12), texts=5, memory=memory)[0] == expected


def test_a_common_beginning_is_processed_once(bundle):
    """At once, and when the first text is long done."""
    beginning = np.random.default_rng(0).integers(3, 90, 30).tolist()
    requests = [Request(n, [*beginning, 40 + n], 3, Sampler(0)) for n in range(9)]
    expected = alone(bundle, requests)
    for texts in (1, 3, 9):
        found, stats = together(bundle, requests, texts=texts)
        assert found == expected
        written = sum(map(len, expected.values()))
        # A prompt's last token gives the first one written; a text's last one is not processed.
        assert stats.prompt.tokens + stats.generation.tokens == 30 + 9 + written - 9


def test_texts_that_are_done_make_room(bundle):
    requests = [Request(n, [5 + n], 1 + n % 7, Sampler(0)) for n in range(20)]
    found, stats = together(bundle, requests, texts=4)
    assert found == alone(bundle, requests)
    assert stats.drafts.passes <= -(-sum(r.most for r in requests) // 4) + 7


def test_a_request_is_taken_when_there_is_room(bundle):
    taken = []

    def some():
        for request in requests_of(12):
            taken.append(request.number)
            yield request

    with Model.open(bundle, context=CONTEXT, texts=3) as model:
        writing = model.write(some())
        next(writing)
        assert len(taken) < 12
        assert 1 + len(list(writing)) == 12 == len(taken)


def test_wrong_requests_are_one_line(bundle):
    with Model.open(bundle, context=CONTEXT, texts=2) as model:
        for request, says in (
            (Request(0, [], 3, Sampler(0)), "one or more whole numbers"),
            (Request(0, [5, 1 << 20], 3, Sampler(0)), "token id 1048576 is not within"),
            (Request(0, [5], 0, Sampler(0)), "0 new tokens cannot be generated"),
            (Request(0, [5] * 40, 10, Sampler(0)), "need a context of 49; it is 48"),
        ):
            with pytest.raises(UserError, match=says):
                list(model.write([request]))
        for texts in (0, 4096):
            with pytest.raises(UserError, match="is not within 1 to 1024"):
                Model.open(bundle, texts=texts)


def test_another_text_ends_it(bundle):
    with Model.open(bundle, context=CONTEXT, texts=2) as model:
        writing = model.write(requests_of(12))
        next(writing)
        model.reset()
        with pytest.raises(UserError, match="another text was begun"):
            list(writing)
        assert model.forward([5]).shape == (model.config.vocab_size,)


def test_a_failure_leaves_the_model_usable(bundle, monkeypatch):
    expected = alone(bundle, requests_of(12))
    with Model.open(bundle, context=CONTEXT, texts=3) as model:
        add, calls = type(model.layers[-1]).add, iter(range(100))

        def failing(layer, h, y, given):
            if next(calls) == 40:
                raise OSError("a read failed")
            return add(layer, h, y, given)

        monkeypatch.setattr(type(model.layers[-1]), "add", failing)
        with pytest.raises(OSError, match="a read failed"):
            list(model.write(requests_of(12)))
        monkeypatch.undo()
        found = {done.request.number: done.token_ids for done in model.write(requests_of(12))}
    assert found == expected


def test_generate_many_is_generate_many_times(bundle):
    prompts = [[5, 6], [7], [5, 6, 8, 9]]
    with Model.open(bundle, context=CONTEXT, texts=2) as model:
        done = {w.request.number: w.token_ids for w in model.generate_many(prompts, 9, seed=3)}
        assert done == {n: list(model.generate(ids, 9, seed=3)) for n, ids in enumerate(prompts)}


def test_fewer_texts_where_the_memory_is_short(bundle, constant_rss):
    with pytest.raises(BudgetError) as caught:
        Model.open(bundle, memory=1, context=CONTEXT)
    least = caught.value.least
    found = []
    for more in (0, 1, 4, 64):
        with Model.open(
            bundle, memory=least + (more << 20), context=CONTEXT, texts=64, fewer=True,
            device="rpi5-nvme",
        ) as model:  # fmt: skip
            found.append(model.plan.texts)
    assert found == sorted(found) and found[0] >= 1 and found[-1] > 1
