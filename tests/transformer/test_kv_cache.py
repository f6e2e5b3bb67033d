"""Layers with an attention window keep about that window, and give the same bits."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA
from flashinfer import Model, UserError, kernels
from flashinfer.formats.convert import convert
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import config_like
from flashinfer.transformer.kv_cache import FRESH, KV_DTYPES, TAKEN_BACK, KeyValueCache

WINDOW, CONTEXT, VOCABULARY = 9, 700, 700
IDS = np.random.default_rng(3).integers(3, VOCABULARY, 650)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_a_window_sees_is_there(data):
    """Texts in pieces, tokens taken back: a token finds the keys of all that it sees."""
    window = data.draw(st.integers(1, 300))
    size = window + TAKEN_BACK + FRESH
    keys = np.zeros((2, size, 32), dtype=np.float32)
    cache, text, farthest = KeyValueCache(keys, keys.copy(), window, size + 1), [], 0
    for _ in range(data.draw(st.integers(1, 8))):
        back = data.draw(st.integers(0, min(len(text), 2 * TAKEN_BACK)))
        text = text[: len(text) - back]
        if not cache.holds(len(text)):
            assert farthest - len(text) > TAKEN_BACK
            text, farthest = [], 0
        start, n = len(text), data.draw(st.integers(1, 900))
        fresh = np.random.default_rng(start + n).standard_normal((n, 2, 32)).astype(np.float32)
        text += list(fresh)
        farthest = max(farthest, len(text))
        stops = []
        for begin, end in cache.pieces(start, n):
            place = cache.remember(fresh[begin:end], -fresh[begin:end], start + begin)
            for token in (begin, end - 1):
                seen = text[max(0, start + token + 1 - window) : start + token + 1]
                at = place + token - begin + 1
                found = cache.keys[:, at - len(seen) : at].transpose(1, 0, 2)
                assert np.array_equal(found, seen)
                assert np.array_equal(
                    -cache.values[:, at - len(seen) : at], cache.keys[:, at - len(seen) : at]
                )
            stops.append((begin, end))
        assert stops[0][0] == 0 and stops[-1][1] == n
        assert all(a[1] == b[0] for a, b in itertools.pairwise(stops))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A model of which two layers of three see WINDOW tokens."""
    path = tmp_path_factory.mktemp("windowed") / "x.flash"
    small = {
        "hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 200,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
        "vocab_size": VOCABULARY, "sliding_window": WINDOW, "model_type": "qwen2",
        "use_sliding_window": True, "max_window_layers": 1,
    }  # fmt: skip
    synthesize(path, {**config_like("mistral-7b", CONTEXT), **small})
    return path


def whole(monkeypatch, path, **options):
    """Logits of IDS where every layer keeps all tokens."""
    with monkeypatch.context() as patch:
        name = "flashinfer.transformer.attention.kept_tokens"
        patch.setattr(name, lambda config, context: context)
        with Model.open(path, context=CONTEXT, **options) as model:
            assert not any(cache.slides for cache in model.text.caches)
            return model.logits(IDS)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_window_changes_no_bit(windowed, twin, monkeypatch, dtype):
    expected = whole(monkeypatch, windowed, kv_dtype=dtype)
    with Model.open(windowed, context=CONTEXT, kv_dtype=dtype) as model:
        slides = [cache.slides for cache in model.text.caches]
        assert slides == [False, True, True]
        assert np.array_equal(model.logits(IDS), expected)
        random = np.random.default_rng(4)
        model.reset()
        while model.position < len(IDS) - 1:  # in pieces, of which some are forgotten again
            begin = model.position
            end = min(len(IDS), begin + int(random.integers(1, 120)))
            logits = model.forward(IDS[begin:end], every=True)
            assert np.array_equal(logits, expected[begin:end])
            model.reset(max(0, end - int(random.integers(0, 40))))
        model.reset(40)  # more than the layers with a window still hold
        assert model.position == 40
        assert np.array_equal(model.forward(IDS[40:45], every=True), expected[40:45])


def test_an_interrupted_prompt_leaves_the_tokens_before_it(windowed, monkeypatch):
    """Also where what is processed again is interrupted, too."""
    expected = whole(monkeypatch, windowed)
    attention = kernels.attention
    with Model.open(windowed, context=CONTEXT) as model:
        model.forward(IDS[:50])
        for calls in (7, 3, 5):  # interrupted in another piece, or in another layer, each time
            left = iter(range(calls))

            def interrupting(*args, left=left):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return attention(*args)

            monkeypatch.setattr(kernels, "attention", interrupting)
            with pytest.raises(KeyboardInterrupt):
                model.forward(IDS[50:600])
            assert model.position == 50
        monkeypatch.setattr(kernels, "attention", attention)
        found = model.forward(IDS[50:90], every=True)
        assert np.array_equal(found, expected[50:90])


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_number_formats_of_keys_are_near(windowed, dtype):
    """q8_0 is off by a hundredth or so of a logit, and by more than f16; f32 by nothing."""
    with Model.open(windowed, context=CONTEXT, kv_dtype="f32") as model:
        expected = model.logits(IDS[:60])
    with Model.open(windowed, context=CONTEXT, kv_dtype=dtype) as model:
        assert all(cache.number_format.name == dtype for cache in model.text.caches)
        assert model.stats.as_dict()["kv_dtype"] == dtype
        off = np.abs(model.logits(IDS[:60]) - expected).max() / np.abs(expected).max()
    low, high = {"f32": (0, 0), "f16": (1e-7, 1e-3), "q8_0": (1e-5, 3e-2)}[dtype]
    assert low <= off <= high


def test_the_usual_number_format_of_keys(windowed, tmp_path):
    """f32 where the attention's weights are, which an opened model's plan says; else f16."""
    with Model.open(windowed) as model:
        assert model.plan.kv_dtype == "f16"
    convert(DATA / "opt-plain", tmp_path / "x.flash", "f16", dense_dtype="f32")
    with Model.open(tmp_path / "x.flash") as model:
        assert model.plan.kv_dtype == "f32"
    with pytest.raises(UserError, match="kv_dtype 'f64' is not one of f32, f16, q8_0"):
        Model.open(windowed, kv_dtype="f64")


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_the_plan_counts_what_is_kept(windowed, dtype):
    """Of the memory for keys and values, and of the time to read them."""
    with Model.open(windowed, context=CONTEXT, kv_dtype=dtype) as model:
        cached = [cache for cache in model.text.caches]
        assert cached[1].keys.shape[1] == WINDOW + TAKEN_BACK + FRESH < CONTEXT
        held = sum(cache.keys.nbytes + cache.values.nbytes for cache in cached)
        assert held <= model.plan.kv_cache <= held + 2 * 3 * 4096


def test_an_interrupted_move_leaves_nothing_to_be_trusted():
    class Interrupting:
        def __iter__(self):
            raise KeyboardInterrupt

    memory = np.zeros((2, WINDOW + TAKEN_BACK + FRESH, 32), dtype=np.float32)
    cache = KeyValueCache(memory, memory.copy(), WINDOW, CONTEXT)
    n = memory.shape[1]
    assert list(cache.pieces(0, n)) == [(0, n)] and cache.holds(n)
    right, cache.values = cache.values, Interrupting()  # the keys are moved, the values are not
    with pytest.raises(KeyboardInterrupt):
        next(cache.pieces(n, 1))
    cache.values = right
    assert not cache.holds(n) and cache.holds(0)
    assert next(cache.pieces(0, 5)) == (0, 5) and cache.holds(5)
