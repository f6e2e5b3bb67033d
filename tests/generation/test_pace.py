"""How much is drafted: by what passes take, what drafts are worth, and what may be lost."""

import numpy as np
import pytest

from flashinfer.generation.drafts import Draft
from flashinfer.generation.pace import MOST_LOST, Pace, PassTimes, tokens_expected


def run(seconds, share, tokens, expected=None, seed=0, kind="x"):
    """(seconds of all passes, tokens) where a pass of T tokens takes seconds(T) and each drafted
    token is right with the probability ``share``."""
    pace, random = Pace(expected, 31), np.random.default_rng(seed)
    pace.begin(tokens)
    taken = 0.0
    done = 0
    while done < tokens:
        draft = Draft(min(31, tokens - done - 1), kind, 0.6, lambda n: [0] * n)
        n = pace.drafted(draft, lambda n: 0.0) if draft.most > 0 else 0
        right = random.random(n) < share
        accepted = int(np.argmin([*right, False]))
        taken += seconds(1 + n)
        pace.took(1 + n, 1 + accepted, seconds(1 + n), 0.0)
        if n:
            pace.learn(draft, n, accepted)
        done += 1 + accepted
    return taken, done


def streamed(tokens):
    return 1 + 0.005 * (tokens - 1)


def computed(tokens):
    return 1 + 0.6 * (tokens - 1)


@pytest.mark.parametrize("expected", [None, streamed, computed])
@pytest.mark.parametrize("seconds", [streamed, computed])
@pytest.mark.parametrize("tokens", [40, 100, 400])
def test_wrong_drafts_cost_next_to_nothing(seconds, expected, tokens):
    """Also where what is expected of a pass is far off."""
    for seed in range(5):
        taken, done = run(seconds, 0.0, tokens, expected, seed)
        # What was not expected of the first draft is lost, once.
        surprise = seconds(32) if seconds is computed and expected is not computed else 0
        assert taken <= (1 + MOST_LOST) * done * seconds(1) + surprise + 1e-9


def test_right_drafts_pay_where_passes_cost_alike():
    gains = {}
    for share in (0.3, 0.6, 0.8, 0.95):
        taken, done = run(streamed, share, 400)
        gains[share] = done * streamed(1) / taken
    assert gains[0.3] > 1.25 and gains[0.6] > 2 and gains[0.8] > 3.5 and gains[0.95] > 8


def test_nothing_is_drafted_where_it_does_not_pay():
    taken, done = run(computed, 0.5, 2000, computed)
    assert taken <= (1 + MOST_LOST) * done


def test_seconds_that_are_not_measured_follow_those_that_are():
    times = PassTimes(lambda tokens: 10.0 * tokens)
    assert times(4) == 40
    times.took(1, 5.0)  # twice as fast as expected
    assert times(1) == 5 and times(4) == 20
    times.took(8, 90.0)
    assert times(8) == 90 and times(7) == pytest.approx(70 * 90 / 80)
    for seconds in (91, 500, 92, 90, 91):
        times.took(8, seconds)
    assert 90 <= times(8) <= 92  # one slow pass says little


def test_tokens_expected():
    assert tokens_expected(0.0, 5) == 1 and tokens_expected(1.0, 5) == 6
    assert tokens_expected(0.5, 2) == pytest.approx(1.75)


def test_a_kind_of_drafts_that_is_wrong_does_not_spoil_another():
    pace = Pace(streamed, 31)
    pace.begin(1000)
    good, bad = (Draft(31, kind, 0.6, lambda n: [0] * n) for kind in ("good", "bad"))
    for _ in range(60):
        for draft, share in ((good, 1.0), (bad, 0.0)):
            n = pace.drafted(draft, lambda n: 0.0)
            accepted = n if share else 0
            pace.took(1 + n, 1 + accepted, streamed(1 + n), 0.0)
            pace.learn(draft, n, accepted)
    assert pace.drafted(good, lambda n: 0.0) >= 15 > 7 >= pace.drafted(bad, lambda n: 0.0)
