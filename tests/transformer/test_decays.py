"""Time steps and decays of recurrent layers, whatever the weights."""

import warnings

import numpy as np

from flashinfer.formats.architectures.recurrent import decays
from flashinfer.transformer.state import steps_and_decays


def rates(dt, decay):
    """(decay, rate) of projected time steps (n, 4), whose bias is 1."""
    dt, decay = np.array(dt, np.float32).reshape(-1, 4), np.array(decay, np.float32)
    rate, decay = steps_and_decays(dt, np.ones(4, np.float32), decay, (0.25, 4.0))
    return decay, rate


def test_steps_are_within_their_limits():
    dt = np.random.default_rng(0).normal(0, 4, (50, 4))
    decay, rate = rates(dt, [-0.5, -1, -2, -16])
    steps = np.clip(np.logaddexp(dt.astype(np.float32).astype(float) + 1, 0), 0.25, 4.0)
    np.testing.assert_allclose(rate, steps, rtol=1e-6)
    np.testing.assert_allclose(decay, np.exp(steps * [-0.5, -1, -2, -16]), rtol=1e-6)


def test_weights_of_no_model():
    """What is not finite stays so, and nothing is said of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decay, rate = rates([np.nan, np.inf, -np.inf, 1e30], [-1, -1, -1, -1])
        assert np.isnan([decay[0, 0], rate[0, 0]]).all()
        assert rate[0, 1:].tolist() == [4.0, 0.25, 4.0]
        decay, _ = rates([0, 0, 0, 0], [3.0, -np.inf, np.nan, 1e30])
    assert decay[0, 0] > 1 and decay[0, 1] == 0 and np.isnan(decay[0, 2]) and decay[0, 3] == np.inf


def test_decays_are_rounded_once():
    logarithms = np.random.default_rng(1).normal(0, 3, 200).astype(np.float32)
    expected = -np.exp(logarithms.astype(np.longdouble))
    assert np.array_equal(decays(logarithms), expected.astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decays(np.array([np.nan, np.inf, -np.inf, 1e30, -1e30], np.float32))
    assert np.isnan(found[0]) and found[1:].tolist() == [-np.inf, 0, -np.inf, 0]
