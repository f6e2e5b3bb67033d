"""Perplexity and KL divergence: against NumPy's and PyTorch's float64, and what they must obey."""

import math

import numpy as np
import pytest

from flashinfer.study.divergence import Comparison, perplexity_of, standard_error

N, VOCABULARY = 40, 96


@pytest.fixture
def two():
    """(logits of a base, of a model (N, VOCABULARY) float32, the tokens that follow (N,))"""
    random = np.random.default_rng(4)
    base = random.normal(0, 3, (N, VOCABULARY)).astype(np.float32)
    noise = random.normal(0, 0.3, base.shape).astype(np.float32)
    return base, base + noise, random.integers(0, VOCABULARY, N)


def compared(base, model, following):
    comparison = Comparison()
    for p, q, token in zip(base, model, following, strict=True):
        comparison.add(p, q, int(token))
    return comparison


def chances(logits):
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


def test_as_the_formulas_say(two):
    base, model, following = two
    p, q, rows = chances(base), chances(model), np.arange(N)
    kl = (p * np.log(p / q)).sum(axis=1)
    of_base, of_model = -np.log(p[rows, following]), -np.log(q[rows, following])
    comparison = compared(*two)
    found = comparison.distance()
    assert comparison.base.perplexity == pytest.approx(np.exp(of_base.mean()), rel=1e-9)
    assert comparison.model.perplexity == pytest.approx(np.exp(of_model.mean()), rel=1e-9)
    assert found.log_ratio == pytest.approx((of_model - of_base).mean(), rel=1e-6)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-9)
    assert found.kl_largest == pytest.approx(kl.max(), rel=1e-9)
    shares = found.kl_median, found.kl_90, found.kl_99, found.kl_99_9
    assert shares == pytest.approx(np.quantile(kl, [0.5, 0.9, 0.99, 0.999]), rel=1e-9)
    assert found.same_top == (p.argmax(axis=1) == q.argmax(axis=1)).mean()


def test_standard_errors_as_llama_cpps_perplexity_tool_has_them(two):
    comparison = compared(*two)
    nats, same = np.array(comparison.nats), np.array(comparison.same, dtype=float)
    of_nats = math.sqrt((np.mean(nats**2) - nats.mean() ** 2) / (N - 1))
    assert comparison.model.nats_error == pytest.approx(of_nats)
    assert comparison.model.perplexity_error == pytest.approx(of_nats * np.exp(nats.mean()))
    share = same.mean()
    found = comparison.distance().same_top_error
    assert found == pytest.approx(math.sqrt(share * (1 - share) / (N - 1)))
    assert standard_error(np.array([1.0])) is None


def test_a_model_is_not_away_from_itself(two):
    base, _, following = two
    comparison = compared(base, base, following)
    found = comparison.distance()
    assert (found.kl_mean, found.kl_largest, found.log_ratio, found.same_top) == (0, 0, 0, 1)
    assert comparison.base == comparison.model


def test_a_perplexity_beyond_float64_is_infinite():
    assert perplexity_of([1e4, 1e4]).perplexity == math.inf


@pytest.mark.parametrize("top", [0, 1, 5, 40, VOCABULARY])
def test_over_named_tokens_it_is_a_lower_bound(two, top):
    base, model, following = two
    whole, part = compared(*two), Comparison()
    for p, q, token in zip(base, model, following, strict=True):
        ids = np.argsort(-q)[:top]
        part.add_named(p, ids, np.log(chances(q[None]))[0, ids], int(token))
    assert all(a <= b * (1 + 1e-6) for a, b in zip(part.kl, whole.kl, strict=True))
    if top == VOCABULARY:
        assert part.kl == pytest.approx(whole.kl, rel=1e-6)
        assert part.model.perplexity == pytest.approx(whole.model.perplexity)
    else:
        assert part.model is None and part.distance().log_ratio is None
    if top:
        assert part.same == whole.same


def test_against_pytorch_in_float64(two):
    torch = pytest.importorskip("torch")
    base, model, following = two
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), dim=1) for x in (base, model))
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=1)
    nats = torch.nn.functional.nll_loss(q, torch.from_numpy(following))
    comparison = compared(*two)
    assert comparison.kl == pytest.approx(kl.numpy(), rel=1e-9)
    assert comparison.model.nats_per_token == pytest.approx(float(nats), rel=1e-9)
