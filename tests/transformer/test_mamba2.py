"""Mamba-2's time steps and decays, whatever the weights."""

import warnings

import numpy as np

from flashinfer.formats.architectures.recurrent import decays
from flashinfer.formats.layers.mamba2 import Mamba2Config
from flashinfer.formats.layers.norm import NormConfig
from flashinfer.transformer.mamba2 import Mamba2

CONFIG = Mamba2Config(
    hidden_size=8, heads=4, head_dim=2, groups=1, state_size=3, kernel=2, norm=NormConfig(),
    steps=(0.25, 4.0),
)  # fmt: skip


def rates(dt, decay):
    """(decay, rate) of projected time steps (n, 4), whose bias is 1."""
    nothing = np.zeros(0, np.float32)
    layer = Mamba2(CONFIG, None, None, nothing, None, np.ones(4, np.float32),
                   np.array(decay, np.float32), nothing, nothing)  # fmt: skip
    return layer._rates(np.array(dt, np.float32).reshape(-1, 4))


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
