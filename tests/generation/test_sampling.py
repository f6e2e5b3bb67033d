import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashinfer.formats.errors import UserError
from flashinfer.generation.sampling import Sampler

LOGITS = np.log(np.float32([0.5, 0.05, 0.25, 0.15, 0.05]))


def drawn(n=400, **settings):
    sampler = Sampler(seed=1, **settings)
    return [sampler(LOGITS) for _ in range(n)]


def test_greedy():
    assert set(drawn(temperature=0)) == {0}
    assert Sampler(temperature=0)(np.float32([1, 3, 3])) == 1  # the first of equals


def test_top_k_and_top_p():
    assert set(drawn(temperature=1, top_k=2, top_p=1)) == {0, 2}
    assert set(drawn(temperature=1, top_k=0, top_p=0.7)) == {0, 2}
    assert set(drawn(temperature=1, top_k=0, top_p=0.4)) == {0}
    assert set(drawn(temperature=1, top_k=0, top_p=1)) == {0, 1, 2, 3, 4}
    assert set(drawn(temperature=1, top_k=100, top_p=1)) == {0, 1, 2, 3, 4}


def test_frequencies_follow_the_probabilities():
    found = np.bincount(drawn(4000, temperature=1, top_k=0, top_p=1), minlength=5) / 4000
    np.testing.assert_allclose(found, np.exp(LOGITS), atol=0.03)
    cold = np.bincount(drawn(4000, temperature=0.5, top_k=0, top_p=1), minlength=5) / 4000
    expected = np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum()
    np.testing.assert_allclose(cold, expected, atol=0.03)


def test_the_seed_repeats():
    assert drawn(temperature=1) == drawn(temperature=1)


@given(st.integers(1, 50), st.floats(0.05, 3), st.integers(0, 60), st.floats(0.01, 1))
def test_any_setting_draws_a_likely_token(n, temperature, k, p):
    logits = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    token = Sampler(temperature, k, p, seed=0)(logits)
    rank = int(np.sum(logits > logits[token]))
    assert rank < (k or n)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0},
                 {"top_p": 1.5}],
)  # fmt: skip
def test_wrong_settings(settings):
    with pytest.raises(UserError):
        Sampler(**settings)
