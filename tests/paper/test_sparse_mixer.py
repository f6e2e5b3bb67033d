"""SparseMixer against its definition and against transformers' own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashinfer.paper.sparse_mixer import sparse_mix

ODD = np.array([np.nan, np.inf, -np.inf, 3e38, 0.0], dtype=np.float32)


def by_definition(s, per_token, jitter):
    """{expert: weight} of one token (experts,), in float64."""
    left, found = list(range(len(s))), {}
    for _ in range(per_token):
        best = max(left, key=lambda e: (s[e], -e))
        near = [e for e in left if s[best] - s[e] <= 2 * jitter * max(abs(s[e]), s[best])]
        found[best] = 1 / sum(np.exp(s[e] - s[best]) for e in near)
        left.remove(best)
    return found


@given(seed=st.integers(0, 1 << 30), jitter=st.sampled_from([0.0, 0.01, 0.1, 0.3, 1.0]))
def test_it_is_its_definition(seed, jitter):
    random = np.random.default_rng(seed)
    logits = random.standard_normal((4, 1 + seed % 9)).astype(np.float32)
    per_token = 1 + int(random.integers(min(3, logits.shape[1])))
    chosen, weights = sparse_mix(logits, per_token, jitter)
    for row, experts, found in zip(logits.astype(np.float64), chosen, weights, strict=True):
        expected = by_definition(row, per_token, jitter)
        assert experts.tolist() == sorted(expected)
        np.testing.assert_allclose(found, [expected[e] for e in experts], rtol=1e-6)


@given(seed=st.integers(0, 1 << 30))
def test_odd_logits_choose_experts_that_there_are(seed):
    random = np.random.default_rng(seed)
    logits = random.standard_normal((3, 6)).astype(np.float32)
    where = random.random(logits.shape) < 0.5
    logits[where] = random.choice(ODD, np.count_nonzero(where))
    chosen, weights = sparse_mix(logits, 2, 0.1)
    assert (np.diff(chosen, axis=1) > 0).all() and chosen.min() >= 0 and chosen.max() < 6
    assert weights.dtype == np.float32
    alone = [sparse_mix(row[None], 2, 0.1) for row in logits]
    np.testing.assert_array_equal(chosen, np.concatenate([one[0] for one in alone]))
    np.testing.assert_array_equal(weights, np.concatenate([one[1] for one in alone]))


@pytest.mark.parity
@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.2])
def test_it_is_that_of_transformers(jitter):
    torch = pytest.importorskip("torch")
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    logits = np.random.default_rng(3).standard_normal((200, 16)).astype(np.float32)
    theirs, their_choice = phimoe.sparsemixer(torch.from_numpy(logits), jitter, training=False)
    order = their_choice.numpy().argsort(axis=1)
    chosen, weights = sparse_mix(logits, 2, jitter)
    assert np.array_equal(chosen, np.take_along_axis(their_choice.numpy(), order, axis=1))
    np.testing.assert_allclose(weights, np.take_along_axis(theirs.numpy(), order, 1), rtol=1e-6)
