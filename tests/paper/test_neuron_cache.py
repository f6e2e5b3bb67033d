"""What stays: priorities, the miss curve and how rows are shared, against plain simulations."""

import itertools

import numpy as np
import pytest

from flashinfer import Model
from flashinfer.calibration.traces import miss_curve
from flashinfer.formats.bundle.calibration import CAPACITIES, LayerCalibration
from flashinfer.formats.errors import BudgetError
from flashinfer.paper.neuron_cache import HALF_LIFE, NEVER, POLICIES, NeuronCache, Priority
from flashinfer.paper.selection import Selection
from flashinfer.plan.slot_shares import CachedLayer, fewest_misses

NEURONS = 64


def trace(tokens=300, seed=0):
    """(tokens, NEURONS) bool: some neurons fire far more often than others."""
    random = np.random.default_rng(seed)
    return random.random((tokens, NEURONS)) < np.geomspace(0.01, 0.5, NEURONS)


def selections(fires):
    return [Selection.of_scores(row[None].astype(np.float32)) for row in fires]


@pytest.mark.parametrize("step", [1, 7, 300])
@pytest.mark.parametrize("begin", [0, 8100, 10**6])  # values are scaled down on the way
def test_priority_is_the_sum_of_the_uses_by_age(step, begin):
    fires = trace()
    priority, lru = Priority(NEURONS, "frecency"), Priority(NEURONS, "lru")
    priority.expect(np.full(NEURONS, 0.5))
    for first in range(0, len(fires), step):
        selection = Selection.of_scores(fires[first : first + step].astype(np.float32))
        priority.note(selection, begin + first)
        lru.note(selection, begin + first)
    sums = (np.exp2((begin + np.arange(300) - priority.begin) / HALF_LIFE)[:, None] * fires).sum(0)
    sums += 0.5 * HALF_LIFE * 2.0 ** (-priority.begin / HALF_LIFE)  # what was expected
    np.testing.assert_allclose(priority.values, sums, rtol=1e-9, atol=1e-300)
    assert np.isfinite(priority.values).all() and priority.values[fires.any(axis=0)].min() > 0
    used = fires.any(axis=0)
    last = np.where(used, begin + len(fires) - fires[::-1].argmax(axis=0), 0)
    assert np.array_equal(lru.values, last)


@pytest.mark.parametrize("policy", ["frecency", "lru"])
def test_the_miss_curve_is_what_caches_of_those_sizes_miss(policy):
    fires = trace(600)
    curve = miss_curve(selections(fires), NEURONS, policy)
    most = fires.sum(axis=1).max()
    for share, expected in zip(CAPACITIES, curve, strict=True):
        rows = round(share * NEURONS)
        if rows < most:  # a token alone does not fit: it takes waves
            continue
        cache = NeuronCache(NEURONS, np.zeros(rows * 8, np.uint8), 8, policy)
        for token, selection in enumerate(selections(fires)):
            if token == len(fires) // 2:
                cache.misses = 0
            cache.place(selection.units, token)
            cache.priority.note(selection, token)
        found = cache.misses / (len(fires) // 2)
        # Those in use now count as the most worth here, and as what they were in the curve.
        assert expected - 0.01 <= found <= 1.12 * expected + 0.05, share
    assert list(curve) == sorted(curve, reverse=True)
    assert curve[-1] == 0 and curve[0] == fires[300:].sum(axis=1).mean()


def test_frecency_misses_least():
    fires = trace(2000)
    frecency, lru = (miss_curve(selections(fires), NEURONS, p) for p in ("frecency", "lru"))
    assert np.mean(frecency) < 0.97 * np.mean(lru)


def test_rows_go_where_they_save_most():
    random = np.random.default_rng(2)
    most, layers = 32, []
    for scale in (3, 1, 9):  # convex, so that the best split is known
        steps = np.sort(random.random(16))[::-1] * scale
        misses = tuple((steps.sum() - np.cumsum([0, *steps])).tolist())
        least = (0.5,) * 8  # units that windows need
        record = LayerCalibration(0.1, 0.1, 0.0, 0, least, least, misses)
        layers.append(CachedLayer(most, 1, (0,) * 8, 1, record))
    for room in (3, 11, 30, 64, 96):
        rows = fewest_misses(layers, room)

        def misses(rows):
            capacities = np.array(CAPACITIES) * most
            return sum(
                np.interp(r, capacities, layer.record.misses)
                for r, layer in zip(rows, layers, strict=True)
            )

        splits = itertools.product(range(1, most + 1), repeat=2)
        best = min(misses((a, b, room - a - b)) for a, b in splits if 1 <= room - a - b <= most)
        assert sum(rows) == room and min(rows) >= 1 and max(rows) <= most
        assert misses(rows) <= best + 1e-9


def test_policies_change_no_bit(synthetic, constant_rss):
    found = []
    for policy in POLICIES:
        with pytest.raises(BudgetError) as caught:
            Model.open(synthetic, memory=1, context=64)
        budget = caught.value.least + (1 << 20)
        with Model.open(synthetic, memory=budget, cache=policy, context=64) as model:
            assert model.plan.policy == policy and (policy == "window") == bool(model.plan.window)
            assert sum(model.plan.slots) < 4 * 1024
            found.append(model.logits(range(3, 43)))
            found.append(np.stack([model.forward([token]) for token in range(3, 13)]))
    assert np.array_equal(found[0], found[2]) and np.array_equal(found[0], found[4])
    assert np.array_equal(found[1], found[3]) and np.array_equal(found[1], found[5])


@pytest.mark.parametrize("policy", ["frecency", "lru"])
def test_rows_that_are_being_read_are_left_alone(policy):
    """While guesses are on their way: no row of theirs is given away, and none moves."""
    random = np.random.default_rng(1)
    cache = NeuronCache(NEURONS, np.zeros(20 * 8, np.uint8), 8, policy)
    overlapped = 0
    for token in range(300):
        guess, used = (
            np.sort(random.choice(NEURONS, 6, replace=False)).astype(np.int32) for _ in range(2)
        )
        used[:3] = guess[:3]  # half of the guess is right
        used = np.unique(used)
        missing, rows = cache.place_prefetched(guess, guess, token)
        cache.priority.note(Selection.of_choices(used[None], np.ones((1, len(used)))), token)
        assert cache.leaves_guesses(used) == (len(used) + len(missing) <= cache.capacity)
        before = cache.neuron_at.copy()
        slots, misses, early = cache.place(used, token)
        wrong = ~np.isin(missing, used)
        assert np.array_equal(early, np.isin(used, missing))
        assert np.array_equal(cache.neuron_at[rows], missing)  # their rows are still theirs
        assert not np.isin(slots[misses], rows[wrong]).any()
        kept = np.isin(before, cache.neuron_at) & (before >= 0)
        assert np.array_equal(cache.neuron_at[kept], before[kept])  # and nothing has moved
        overlapped += len(missing) > 0
    assert overlapped > 200 and cache.guesses > cache.right_guesses > 0
    assert not NeuronCache(NEURONS, cache.memory, 8, "window", 3).leaves_guesses(used)


def test_a_cache_without_slots_holds_nothing():
    """As that of a layer whose experts all pass through slots in transit."""
    cache = NeuronCache(NEURONS, np.zeros(0, np.uint8), 8, "frecency")
    units = np.arange(4, dtype=np.int32)
    before = cache.last_uses(units)
    assert before.tolist() == [NEVER] * 4
    cache.restore_uses(units, before)
    assert cache.last_uses(units[:0]).shape == (0,)
