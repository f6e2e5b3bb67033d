"""A store of texts: what is looked up, against a plain search; and files that are no store."""

import numpy as np
import pytest
from drafting import drafting

from flashinfer import FormatError, Model, UserError
from flashinfer.formats.safetensors import SafetensorsFile
from flashinfer.generation.drafts import NGrams
from flashinfer.generation.sampling import Sampler
from flashinfer.generation.store import Store, is_store, write_store
from flashinfer.generation.suffixes import LONGEST, SuffixIndex, agreement, suffix_array

S = Sampler(0)


def texts_of(seed, tokens=5, count=30, longest=60):
    random = np.random.default_rng(seed)
    return [random.integers(0, tokens, random.integers(0, longest)).tolist() for _ in range(count)]


def longest_match(texts, ids):
    """How many of the last tokens stand somewhere in a row, at most LONGEST."""
    for k in range(min(LONGEST, len(ids)), 0, -1):
        if any(t[i : i + k] == ids[-k:] for t in texts for i in range(len(t) - k + 1)):
            return k
    return 0


def stands(texts, path):
    return any(t[i : i + len(path)] == path for t in texts for i in range(len(t)))


@pytest.mark.parametrize("seed", range(4))
def test_the_longest_match_and_what_follows(seed):
    texts, random = texts_of(seed), np.random.default_rng(seed)
    index = SuffixIndex.of(texts)
    for _ in range(150):
        ids = random.integers(0, 5, random.integers(1, 14)).tolist()
        length, places = index.longest(ids)
        assert length == longest_match(texts, ids)
        if length:
            end = ids[-length:]
            assert len(places) == sum(
                t[i : i + length] == end for t in texts for i in range(len(t) - length + 1)
            )
            following = index.following(places, length, 5, 10)
            assert stands(texts, end + following)
            if len(following) < 10:  # only where a text ends
                assert any(t[-len(end + following) :] == end + following for t in texts)


def test_what_most_texts_go_on_with_is_drafted():
    index = SuffixIndex.of([[1, 2, 3, 4]] * 5 + [[1, 2, 9, 9]] * 2)
    length, places = index.longest([7, 1, 2])
    assert (length, index.following(places, length, 10, 5)) == (2, [3, 4])


@pytest.mark.parametrize("n", [1, 2, 50, 3000])
def test_suffixes_are_sorted(n):
    tokens = np.random.default_rng(n).integers(0, 3, n).astype(np.uint32)
    order = suffix_array(tokens).tolist()
    assert sorted(order) == list(range(n))
    raw = tokens.astype(">u4").tobytes()
    beginnings = [raw[4 * i : 4 * i + 4 * 64] for i in order]
    assert beginnings == sorted(beginnings)


def test_ngrams_take_the_last_place_and_go_round():
    drafter = NGrams(40)
    draft = drafter.draft([1, 2, 3, 9, 1, 2, 4, 1, 2], 6, S)
    assert draft.kind == "ngram 2" and draft.tokens(6) == [4, 1, 2, 4, 1, 2]
    assert drafter.draft([1, 2, 3], 6, S) is None
    assert drafter.draft([5, 5, 5], 4, S).tokens(4) == [5, 5, 5, 5]
    assert drafter.draft([7], 4, S) is None  # a shorter text than the one before


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "x.store"
    assert write_store(path, texts_of(0), "vocabulary") == sum(map(len, texts_of(0)))
    return path


def test_a_store_is_read_as_it_was_written(store):
    found, index = Store(store, 5), SuffixIndex.of(texts_of(0))
    assert found.vocabulary == "vocabulary" and is_store(store)
    assert found.mapped_bytes == store.stat().st_size
    for text in texts_of(1):
        draft, (length, places) = found.draft(text, 7, S), index.longest(text)
        assert (draft is None) == (length == 0)
        if draft:
            assert draft.tokens(7) == index.following(places, length, 5, 7)
    found.close()


def test_a_large_store_gives_its_memory_back(store, monkeypatch):
    monkeypatch.setattr("flashinfer.generation.store.MAPPED_BYTES", 1000)
    monkeypatch.setattr("flashinfer.generation.store.LOOKUP_BYTES", 400)
    found, small = Store(store, 5), SuffixIndex.of(texts_of(0))
    assert found.mapped_bytes == 1000
    for text in texts_of(1):
        draft = found.draft(text, 7, S)
        assert found.looked_up <= 1000
        assert (draft is None) == (small.longest(text)[0] == 0)


def test_damaged_stores_are_one_line(store, tmp_path):
    """Each byte, in turn with others, flipped; the file cut anywhere."""
    raw, bad = store.read_bytes(), tmp_path / "bad.store"
    random = np.random.default_rng(0)
    with SafetensorsFile(store) as file:
        padding = range(8 + len(file._read_header(1 << 20).rstrip()), 8 + file.header_bytes)
    for at in random.integers(0, len(raw), 200).tolist():
        changed = bytearray(raw)
        changed[at] ^= 1 << int(random.integers(0, 8))
        bad.write_bytes(changed)
        with pytest.raises(FormatError, match=r"bad\.store"):
            Store(bad, 5)
    for length in random.integers(0, len(raw), 60).tolist():
        bad.write_bytes(raw[:length])
        with pytest.raises(FormatError, match=r"bad\.store"):
            Store(bad, 5)
    assert padding


def test_tokens_beyond_the_vocabulary_are_never_drafted(tmp_path):
    write_store(tmp_path / "x.store", [[1, 2, 3, 700, 4]], "v")
    found = Store(tmp_path / "x.store", 10)
    assert found.draft([1, 2], 5, S).tokens(5) == [3]


def test_no_store_of_nothing(tmp_path):
    for texts in ([], [[]], [[], []]):
        with pytest.raises(UserError, match="0 tokens make no store"):
            write_store(tmp_path / "x.store", texts, "v")
    assert not list(tmp_path.iterdir())


def test_a_models_drafts_come_from_the_store(plain, tmp_path):
    with Model.open(plain, draft="off") as model:
        expected = list(model.generate([5, 6], 20, 0, stop_at_eos=False))
        write_store(tmp_path / "x.store", [[5, 6, *expected]], model.bundle.vocabulary)
        write_store(tmp_path / "other.store", [[5, 6]], "another vocabulary")
    with Model.open(plain, draft=tmp_path / "x.store") as model:
        drafting(model)
        assert list(model.generate([5, 6], 20, 0, stop_at_eos=False)) == expected
        assert model.stats.drafts.accepted == model.stats.drafts.drafted > 10
    with pytest.raises(UserError, match="token ids are not those of"):
        Model.open(plain, draft=tmp_path / "other.store")


def test_a_smaller_model_drafts_in_the_same_budget(plain, calibrated, synthetic, constant_rss):
    for sampling in ({"temperature": 0}, {"temperature": 0.9, "seed": 5}):
        with Model.open(plain, draft="off") as model:
            expected = list(model.generate([5, 6], 20, stop_at_eos=False, **sampling))
        with Model.open(plain, draft=calibrated, memory="400M", neurons="dense") as model:
            drafting(model)
            found = list(model.generate([5, 6], 20, stop_at_eos=False, **sampling))
            assert found == expected and model.stats.drafts.drafted > 0
            small = model.drafter.model
            assert model.plan.base >= small.plan.base + small.plan.own
            assert model.plan.base + model.plan.own <= model.plan.budget
        assert small.closed
    with pytest.raises(UserError, match="token ids are not those of"):
        Model.open(plain, draft=synthetic)


def test_agreement_is_what_others_name():
    texts = [[1, 2, 3, 4, 5]] * 4
    assert agreement(texts, 10, 4) == (1.0, 4)
    assert agreement([[1, 2, 3]], 10, 4) == (0.0, 2)
