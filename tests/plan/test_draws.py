"""How many experts tokens miss in the cost model: as many on average as is expected, by chance."""

import numpy as np
import pytest

from flashinfer.plan.draws import SAMPLES, Draws

LAYERS = range(96)


@pytest.mark.parametrize("mean", [0.0, 0.05, 0.41, 1.2, 3.9, 4.0])
def test_they_are_binomial(mean):
    found = np.array([[Draws(n, s).of(4, mean) for s in range(SAMPLES)] for n in LAYERS])
    assert set(found.ravel()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    assert found.mean() == pytest.approx(mean, abs=0.02)
    assert found.var() == pytest.approx(mean * (1 - mean / 4), abs=0.08)


def test_the_same_token_misses_the_same():
    """So that plans which differ in what they guess are compared on the same tokens."""
    assert Draws(5, 3).of(4, 1.3) == Draws(5, 3).of(4, 1.3)
    assert len({Draws(5, s).of(4, 1.3) for s in range(SAMPLES)}) > 1


def test_without_a_sample_it_is_the_mean():
    assert Draws(0, None).of(4, 1.25) == 1.25 and Draws(0, None).of(0, 0) == 0
    assert all(Draws(1, s).of(0, 0) == 0 for s in range(SAMPLES))
