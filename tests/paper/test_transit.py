"""Units that pass through: the cache against a plain model, and every unit's bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.calibration.traces import miss_curve
from flashinfer.formats.bundle.calibration import CAPACITIES, LayerCalibration
from flashinfer.paper.neuron_cache import LAST_USE, POLICIES, NeuronCache
from flashinfer.paper.selection import Selection
from flashinfer.paper.waves import in_waves
from flashinfer.paper.ways import MOST_WAVES, transit_slots, wave_size
from flashinfer.plan.slot_shares import CachedLayer, fewest_misses, share_slots

UNITS, SLOT, OTHERS = 24, 8, 3


class Plain:
    """What a layer of ``capacity`` slots keeps where units may pass through: a set, and a rule."""

    def __init__(self, capacity, cache):
        self.capacity, self.cache, self.held = capacity, cache, set()
        self.safe, self.admitted = set(), set()

    def place(self, wave, busy, coming):
        """Which of the wave must be read. What is worth more than what it pushes out stays."""
        worth = self.cache.priority.worth()
        missing = [u for u in wave if u not in self.held]
        safe = self.held & {*wave, *busy, *coming}
        for unit in sorted(missing, key=lambda u: (-worth[u], u)):
            if len(self.held) < self.capacity:
                self.held.add(unit)
                safe.add(unit)
                continue
            worst = min(self.held - safe, key=lambda u: worth[u], default=None)
            if worst is not None and worth[unit] > worth[worst]:
                self.held.remove(worst)
                self.held.add(unit)
                safe.add(unit)
        self.safe, self.admitted = safe, set(missing)
        return missing

    def agree(self):
        """The cache keeps the same, or of those worth the same, which are all alike, others."""
        held = set(self.cache.neuron_at[: self.cache.used].tolist())
        worth = self.cache.priority.worth()
        np.testing.assert_array_equal(*(np.sort(worth[list(h)]) for h in (held, self.held)))
        assert self.safe - self.admitted <= held
        self.held = held


def selection_of(draw, tokens, experts):
    if not experts:
        used = draw(st.lists(st.integers(0, UNITS - 1), min_size=1, max_size=UNITS, unique=True))
        scores = np.full((tokens, UNITS), -1, np.float32)
        scores[:, used] = 1
        scores[: tokens - 1, used[::2]] = -1  # some are used by the last token only
        return Selection.of_scores(scores)
    seed = draw(st.integers(0, 1 << 30))
    random = np.random.default_rng(seed)
    chosen = np.sort([random.choice(UNITS, 5, replace=False) for _ in range(tokens)], axis=1)
    return Selection.of_choices(chosen, random.random((tokens, 5), dtype=np.float32))


class Memory:
    """Fills slots with their units' numbers as reads would, and looks whether they stay."""

    def __init__(self, cache):
        self.cache = cache

    def fill(self, units, slots):
        for unit, slot in zip(units, slots, strict=True):
            begin = self.cache.starts[slot]
            self.cache.memory[begin : begin + SLOT] = unit

    def check(self, units, slots):
        for unit, slot in zip(units, slots, strict=True):
            begin = self.cache.starts[slot]
            assert (self.cache.memory[begin : begin + SLOT] == unit).all()


@given(st.data())
@settings(max_examples=150)
def test_any_sequence_of_passes(data):
    """As ``Waves`` places them: each unit's bytes are in its slot while it is computed, those kept
    stay until they are evicted, no other layer's memory is written, and what is kept is what a
    plain model of the rule keeps."""
    draw = data.draw
    capacity = draw(st.integers(0, UNITS))
    transit = draw(st.integers(0 if capacity > 1 else 1, 6))
    policy = draw(st.sampled_from(POLICIES))
    window = draw(st.integers(1, 4)) if policy == "window" else None
    experts = draw(st.booleans())
    memory = np.full((OTHERS + capacity + OTHERS + transit + OTHERS) * SLOT, 255, dtype=np.uint8)
    own = slice(OTHERS * SLOT, (OTHERS + capacity) * SLOT)
    passing = slice(own.stop + OTHERS * SLOT, own.stop + (OTHERS + transit) * SLOT)
    cache = NeuronCache(UNITS, memory, SLOT, policy, window, own, passing)
    assert (cache.capacity, cache.transit) == (capacity, transit)
    plain, filled, token = Plain(capacity, cache), Memory(cache), 0
    begin_waves, place_wave = cache.begin_waves, cache.place_wave

    def watched_begin(units, now):
        begin_waves(units, now)
        plain.held = set(cache.neuron_at[: cache.used].tolist())
        filled.check(cache.neuron_at[: cache.used], np.arange(cache.used))

    def watched_place(wave, busy, coming, now):
        slots, misses = place_wave(wave, busy, coming, now)
        if transit:
            missing = plain.place(wave.tolist(), busy.tolist(), coming.tolist())
            assert wave[misses].tolist() == missing
            plain.agree()
        return slots, misses

    cache.begin_waves, cache.place_wave = watched_begin, watched_place
    for _ in range(draw(st.integers(1, 12))):
        tokens = draw(st.integers(1, 3))
        selection = selection_of(draw, tokens, experts)
        cache.priority.note(selection, token)
        units, now, before = selection.units, token + tokens - 1, cache.hits + cache.misses
        for first, stop, slots in in_waves(cache, units, now, 2, filled.fill):
            filled.check(units[first:stop], slots)
        assert cache.hits + cache.misses - before == len(units)
        slots = cache.slot_of[units]
        cache.used_at(slots[slots >= 0], token, selection.last[slots >= 0])
        token += tokens
    theirs = np.ones(len(memory), dtype=bool)
    theirs[own] = theirs[passing] = False
    assert (memory[theirs] == 255).all()


def test_what_is_used_most_stays():
    """Two slots and four units a token: one that every token uses stays beside those of one."""
    cache = NeuronCache(UNITS, np.zeros(5, np.uint8), 1, "frecency", None, slice(2), slice(2, 5))
    random = np.random.default_rng(0)
    for token in range(60):
        units = np.sort([3, *random.choice(np.arange(4, UNITS), 3, replace=False)]).astype(np.int32)
        weights = np.where(units == 3, 0.1, 0.3).astype(np.float32)
        cache.priority.note(Selection.of_choices(units[None], weights[None]), token)
        list(in_waves(cache, units, token, 64, lambda units, slots: None))
        if token > 20:
            assert cache.slot_of[3] >= 0

    assert cache.hits > 54  # admitting everything, two slots would find it hardly ever


@pytest.mark.parametrize("weights", [[0.5, 0.25, 0.25], [0, 0, 0], [np.nan, 1, 1], [np.inf, 1, 1]])
def test_a_last_use_counts_by_its_weight(weights):
    """Shared among the units of the last token; alike where weights say nothing."""
    cache = NeuronCache(UNITS, np.zeros(3, np.uint8), 1, "frecency")
    first = np.array([[1, 2, 9]], dtype=np.int32)
    cache.priority.note(Selection.of_choices(first, np.ones((1, 3), np.float32)), 0)
    chosen = np.array([[0, 4, 5], [2, 5, 7]], dtype=np.int32)
    both = np.array([[1, 1, 1], weights], dtype=np.float32)
    cache.priority.note(Selection.of_choices(chosen, both), 1)
    extra = (cache.priority.worth() - cache.priority.values) / 2 ** (2 / 16)
    shares = np.array([1.5, 0.75, 0.75]) if weights[0] == 0.5 else np.ones(3)
    np.testing.assert_allclose(extra[[2, 5, 7]], LAST_USE * shares)
    assert np.count_nonzero(extra) == 3
    lru = NeuronCache(UNITS, np.zeros(3, np.uint8), 1, "lru").priority
    lru.note(Selection.of_choices(chosen, both), 1)
    assert lru.worth() is lru.values


def test_accepted_drafts_are_weighed_as_if_they_had_come_alone():
    """Whatever was drafted behind them."""
    random = np.random.default_rng(0)
    chosen = np.sort(random.permuted(np.tile(np.arange(9), (6, 1)), axis=1)[:, :3]).astype(np.int32)
    weights = random.random(chosen.shape, dtype=np.float32)
    together = Selection.of_choices(chosen, weights)
    for kept in range(1, 7):
        worths = []
        for selections in (
            [(together.between(0, 1), 0), (together.between(1, kept), 0)][: 1 + (kept > 1)],
            [(Selection.of_choices(chosen[[t]], weights[[t]]), t) for t in range(kept)],
        ):
            cache = NeuronCache(UNITS, np.zeros(3, np.uint8), 1, "frecency")
            for selection, token in selections:
                cache.priority.note(selection, token)
            worths.append(cache.priority.worth())
        np.testing.assert_allclose(*worths, rtol=1e-6)


def routed(tokens, seed=0):
    """Selections of 5 units, of which the token before used some, the heavier the likelier."""
    random = np.random.default_rng(seed)
    liked, lasting, found = random.normal(0, 0.5, UNITS), np.zeros(UNITS), []
    for _ in range(tokens):
        lasting = 0.7 * lasting + random.normal(0, 1, UNITS)
        scores = liked + lasting
        chosen = np.sort(np.argsort(-scores)[:5])[None]
        found.append(Selection.of_choices(chosen, np.exp(scores[chosen]).astype(np.float32)))
    return found


@pytest.mark.parametrize("policy", ["frecency", "lru"])
def test_the_miss_curve_begins_at_no_slots(policy):
    """What caches of less than a token's units miss, and how much more those that admit all."""
    trace = routed(3000)
    curve = miss_curve(trace, UNITS, policy, passing=True)
    found, evicting = {}, {}
    for capacity in (0, 1, 2, 3, 4):
        for transit, misses in ((2, found), (0, evicting)):
            if not capacity and not transit:
                continue
            memory = np.zeros(capacity + transit, np.uint8)
            own, passing = slice(capacity), slice(capacity, capacity + transit)
            cache = NeuronCache(UNITS, memory, 1, policy, None, own, passing)
            for token, selection in enumerate(trace):
                if token == len(trace) // 2:
                    cache.misses = 0
                cache.priority.note(selection, token)
                list(in_waves(cache, selection.units, token, 64, lambda units, slots: None))
            misses[capacity] = cache.misses / (len(trace) - len(trace) // 2)
        expected = np.interp(capacity / UNITS, CAPACITIES, curve)
        assert found[capacity] == pytest.approx(expected, rel=0.09)
    assert found[0] == curve[0] == 5
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert all(found[n] < 0.97 * evicting[n] for n in (1, 2, 3))


def test_slots_go_to_few_layers_where_each_may_have_none():
    """Each layer's curve says what its slots save; a layer that saves nothing gets none."""
    useful = tuple(max(0.0, 4 - 8 * share) for share in CAPACITIES)
    layers = [
        CachedLayer(16, 1, (4,), 0, LayerCalibration(0.25, 0.25, 0.0, 0, (4.0,), (4.0,), misses))
        for misses in ((4.0,) * 17, useful, useful)
    ]
    for room in range(17):
        slots = fewest_misses(layers, room, passing=True)
        assert slots[0] == 0 and sum(slots) == room and max(slots) <= 8
    assert fewest_misses(layers, 6) == [2, 2, 2]
    unknown = [CachedLayer(16, 1, (4,), 0, None) for _ in range(3)]
    assert share_slots(unknown, 7, "frecency", None, passing=True).slots == [3, 2, 2]


def test_waves_fit_their_slots():
    for slots in range(40):
        for transit in range(0 if slots else 1, 12):
            for unit_neurons in (1, 64):
                for slot_bytes in (8 << 10, 1 << 20, 100 << 20):
                    size, ahead = wave_size(slots, transit, unit_neurons, slot_bytes)
                    assert size >= 1 and 0 <= ahead < MOST_WAVES
                    assert (1 + ahead) * size <= (transit or slots)
    assert [transit_slots(8, nbytes << 20) for nbytes in (1, 3, 9)] == [8, 4, 2]
