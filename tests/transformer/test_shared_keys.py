"""Layers that read an earlier layer's keys and values: they keep none of their own, and whatever
way a text takes, a token has the same bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import CONTEXT, drafted, share_passes, taken_back_anywhere

from conftest import DATA
from flashinfer import BudgetError, Model
from flashinfer.calibration.text_states import TextStates
from flashinfer.formats.convert import convert
from flashinfer.oracle.kits.configs import FAR, NEAR, KitModel, gemma4
from flashinfer.oracle.kits.hugging_face_form import write_hugging_face
from flashinfer.paper.selection import Tokens
from flashinfer.plan import setup
from flashinfer.plan.sizes import MAX_CHUNK, memory_bytes
from flashinfer.transformer.kv_cache import KV_DTYPES, TAKEN_BACK, KeyValueCache, pages
from flashinfer.transformer.kv_flash import may_lie_on_flash
from flashinfer.transformer.text import MOST_IN_PASS, Part
from flashinfer.transformer.text_memory import BorrowedMemory

IDS = np.random.default_rng(0).integers(3, 96, 44).tolist()
ROWS = 40_000  # of tokens, so that they do not fit small budgets
LONG = 2200  # tokens of a text that is longer than what a layer with a window keeps
# The second and third layer keep keys for the others; the first keeps its own.
LAYERS = [FAR, NEAR, FAR, NEAR, FAR, NEAR, FAR]
LENDERS = {1, 2}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A bundle of a small model, whose layers 3 and after have no keys."""
    target = tmp_path_factory.mktemp("shared") / "x.flash"
    convert(DATA / "gemma4-shared", target, "f32")
    return target


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """The same of a longer context and more layers."""
    folder = tmp_path_factory.mktemp("long")
    config = gemma4(
        LAYERS, hidden_size_per_layer_input=8, vocab_size_per_layer_input=ROWS,
        num_kv_shared_layers=4, max_position_embeddings=LONG,
    )  # fmt: skip
    write_hugging_face(KitModel("long", config), folder)
    convert(folder, folder / "x.flash", "f32")
    return folder / "x.flash"


@pytest.fixture(scope="module")
def expected(path):
    """The logits of IDS (T, vocab_size)."""
    with Model.open(path, context=CONTEXT, draft="off") as model:
        return model.logits(IDS)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_however_many_tokens_a_pass_takes(path, dtype, twin):
    with Model.open(path, context=CONTEXT, kv_dtype=dtype) as model:
        whole = model.logits(IDS)
        for sizes in ([1] * 44, [2] * 22, [3, 40, 1], [43, 1]):
            model.reset()
            done, rows = 0, []
            for n in sizes:
                rows.append(model.forward(IDS[done : done + n], every=True))
                done += n
            assert np.array_equal(np.concatenate(rows), whole)


def test_a_text_longer_than_what_windows_keep(long):
    """In passes of the largest size and of others, after which tokens are taken back."""
    ids = np.random.default_rng(1).integers(3, 96, LONG).tolist()
    with Model.open(long, context=LONG) as model:
        assert model.plan.chunk == MAX_CHUNK
        whole = model.logits(ids)
        for seed in range(3):
            random, done = np.random.default_rng(seed), 0
            model.reset()
            while done < LONG:
                n = int(random.integers(1, (2, 100, MAX_CHUNK)[seed] + 1)) if done else LONG // 2
                rows = model.forward(ids[done : done + n], every=True)
                assert np.array_equal(rows, whole[done : done + n])
                done += n
                back = int(random.integers(0, min(n, TAKEN_BACK))) if random.random() < 0.2 else 0
                if done < LONG:
                    done -= back
                    model.reset(done)


def test_as_many_tokens_as_a_pass_may_have_find_room(long):
    """Of one text, where many texts share passes."""
    ids = np.random.default_rng(1).integers(3, 96, LONG).tolist()
    with Model.open(long, context=LONG, draft="off") as model:
        whole = model.logits(ids)
        model.reset()
        model.forward(ids[:700])
        h = model.passes([Part(model.text, np.array(ids[700 : 700 + MOST_IN_PASS]))])
        assert np.array_equal(model.decoder.logits(h), whole[700 : 700 + MOST_IN_PASS])


def test_only_layers_with_keys_of_their_own_take_memory(long):
    with Model.open(long, context=LONG) as model:
        config, plan, total = model.config, model.plan, 0
        for number, (layer, cache) in enumerate(zip(config.layers, model.text.caches, strict=True)):
            mixer, nbytes = layer.attention, memory_bytes(layer.mixer, plan, False)
            total += nbytes
            assert (mixer.memory_of is not None) == isinstance(cache, BorrowedMemory)
            if mixer.memory_of is not None:
                assert nbytes == 0 and cache.of is model.text.caches[mixer.memory_of]
                lender = config.layers[mixer.memory_of].attention
                assert mixer.attention_window == lender.attention_window
                continue
            assert isinstance(cache, KeyValueCache) and mixer.lends == (number in LENDERS)
            kept = LONG if mixer.attention_window is None else 9 + TAKEN_BACK + MOST_IN_PASS
            assert cache.keys.shape[1] == kept
            assert nbytes == 2 * pages(cache.keys.nbytes)
        assert total <= plan.kv_cache <= total + (1 << 20)


def test_what_several_layers_read_stays_in_dram(long, tmp_path, monkeypatch):
    ids = np.random.default_rng(1).integers(3, 96, 300).tolist()
    with Model.open(long, context=LONG) as model:
        plenty = model.logits(ids)
        able = [may_lie_on_flash(layer.mixer, LONG) for layer in model.config.layers]
        assert able == [True] + [False] * 6
    monkeypatch.setattr(setup, "KV_SHARES", (1.0,))
    with Model.open(long, context=LONG, scratch=tmp_path) as model:
        assert model.plan.kv_on_flash == (0,)
        assert np.array_equal(model.logits(ids), plenty)


@settings(deadline=None, max_examples=8)
@given(st.data())
def test_tokens_are_taken_back_anywhere(path, expected, data):
    taken_back_anywhere(path, IDS, expected, data)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_drafts_change_nothing(path, share):
    drafted(path, IDS, share)


def test_texts_share_passes(path):
    share_passes(path, IDS)


def test_a_session_holds_each_key_once(path, tmp_path, expected):
    with Model.open(path, context=CONTEXT, draft="off") as model:
        model.forward(IDS[:30])
        model.save_session(tmp_path / "x.session")
    with Model.open(path, context=CONTEXT, draft="off") as model:
        model.load_session(tmp_path / "x.session")
        assert model.position == 30
        assert np.array_equal(model.forward(IDS[30:], every=True), expected[30:])


def test_budget_changes_no_bit(long, twin, constant_rss):
    """From the least, where the rows of tokens are read one by one, to plenty."""
    with Model.open(long, context=CONTEXT, draft="off") as model:
        plenty = model.logits(IDS)
    with pytest.raises(BudgetError) as caught:
        Model.open(long, memory=1, context=CONTEXT)
    kept = set()
    for extra in (0, 1, 40):
        budget = caught.value.least + (extra << 20)
        with Model.open(long, memory=budget, context=CONTEXT, draft="off") as model:
            kept.add(model.plan.embeddings > 0)
            assert np.array_equal(model.logits(IDS), plenty), model.plan
            model.reset()
            single = np.stack([model.forward([token]) for token in IDS[:12]])
            assert np.array_equal(single, plenty[:12])
    assert kept == {True, False}


def test_a_text_goes_through_layer_by_layer(long):
    """As calibration lets it, in several sequences."""
    ids = np.random.default_rng(1).integers(3, 96, 3000)
    with Model.open(long, context=LONG, neurons="dense", draft="off") as model:
        states = TextStates(model, ids, 1500)
        for layer in model.layers:
            x, residual = states.attend(layer)
            y = np.concatenate([
                layer.feed_forward(x[at : at + 500], Tokens(0, 500), residual[at : at + 500])
                for at in range(0, len(ids), 500)
            ])  # fmt: skip
            states.add(layer, y)
        for start in (0, 1500):
            own = model.decoder.logits(states.h[start : start + 1500].copy())
            assert np.array_equal(own, model.logits(ids[start : start + 1500]))
