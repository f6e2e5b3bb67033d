"""A router that chooses before its layer's tokens are mixed: reads begin sooner, bits stay."""

import dataclasses

import numpy as np
import pytest

from conftest import logits_of
from flashinfer import Model
from flashinfer.calibration.calibrate import calibrate
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import convert
from flashinfer.oracle.kits.kit import write_kit
from flashinfer.paper.flash import Flash
from flashinfer.paper.prefetch import NoPrefetch
from flashinfer.plan import setup

IDS = np.random.default_rng(0).integers(3, 96, 40)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """The models of a kit that are SmallThinkers."""
    write_kit(folder := tmp_path_factory.mktemp("early") / "kit", ["smallthinker"])
    return folder / "models"


@pytest.fixture(scope="module")
def model(kit, tmp_path_factory):
    """A bundle of a small SmallThinker."""
    convert(kit / "smallthinker", path := tmp_path_factory.mktemp("early") / "x.flash", "f32")
    return path


@pytest.fixture
def slots(monkeypatch):
    """Has a plan give each layer so many slots, and so many in transit."""
    make_plan = setup.make_plan

    def give(own, transit):
        def planned(*arguments, **options):
            plan = make_plan(*arguments, **options)
            sizes, layers = plan.slot_bytes, len(plan.slots)
            passing = transit * max(sizes)
            return dataclasses.replace(
                plan, slots=(own,) * layers, transit=passing, cache=own * sum(sizes) + passing
            )

        monkeypatch.setattr(setup, "make_plan", planned)

    return give


@pytest.mark.parametrize("io", ["auto", "threads", "buffered"])
@pytest.mark.parametrize("cache", ["frecency", "lru", "window"])
@pytest.mark.parametrize(("own", "transit"), [(0, 3), (1, 3), (3, 0), (5, 0), (5, 2), (8, 0)])
def test_no_bit_changes(model, slots, own, transit, cache, io, twin):
    with Model.open(model, context=48) as whole:
        expected = whole.logits(IDS)
    slots(own, transit)
    window = {"window": 2} if cache == "window" else {}
    with Model.open(model, context=48, cache=cache, io=io, draft="off", **window) as one:
        assert np.array_equal([one.forward(IDS[i : i + 1]) for i in range(len(IDS))], expected)
        caches = [layer.feed_forward.store.cache for layer in one.layers]
        right, guesses = (sum(getattr(c, n) for c in caches) for n in ("right_guesses", "guesses"))
        whole = own == 8 and cache != "window"
        assert (guesses > 0) == (own >= 3 and not whole)  # of the next layer's
        assert (right > 0) == (guesses > 0) and right <= guesses
        assert np.array_equal(one.logits(IDS), expected)


def test_reads_begin_before_attention(model, slots, monkeypatch):
    """What a token misses is on its way when its layer's attention is computed."""
    slots(4, 0)
    events = []
    submit = Flash.submit
    monkeypatch.setattr(
        Flash, "submit", lambda self, *a, **k: (events.append("read"), submit(self, *a, **k))[1]
    )
    with Model.open(model, context=48, draft="off") as one:
        one.forward(IDS[:8])
        for layer in one.layers:
            mixer, layer.feed_forward.prefetch = layer.mixer, NoPrefetch()

            def mixed(x, texts, mixer=mixer):
                events.append("mix")
                return mixer(x, texts)

            monkeypatch.setattr(layer, "mixer", mixed)
        events.clear()
        for i in range(8, 24):
            one.forward(IDS[i : i + 1])
    reads = [i for i, event in enumerate(events) if event == "read"]
    assert reads
    assert all(events[i + 1] == "mix" for i in reads)


def test_a_failed_read_leaves_nothing_half_read(model, slots, monkeypatch):
    with Model.open(model, context=48) as whole:
        expected = whole.logits(IDS)
    slots(4, 0)
    with Model.open(model, context=48, draft="off") as one:
        wait = Flash.wait
        for fails in range(1, 12):
            count = 0

            def failing(self, reads, fails=fails):
                nonlocal count
                count += 1
                if count == fails:
                    raise KeyboardInterrupt
                return wait(self, reads)

            one.reset()
            one.forward(IDS[:20])
            with monkeypatch.context() as patch:
                patch.setattr(Flash, "wait", failing)
                with pytest.raises(KeyboardInterrupt):
                    for i in range(20, 40):
                        one.forward(IDS[i : i + 1])
            done = one.position
            for i in range(done, 40):
                assert np.array_equal(one.forward(IDS[i : i + 1]), expected[i])


def test_calibration_counts_what_the_router_chose(model, tmp_path):
    """Experts by what the router reads, and their neurons by what they read."""
    ids = np.random.default_rng(2).integers(3, 96, 1200)
    calibrate(model, ids, predictor="none", destination=tmp_path / "routed.flash", tokens=1200)
    with Bundle(tmp_path / "routed.flash") as bundle, Model.open(model, context=48) as one:
        records = np.array([record.uses for record in bundle.calibration.layers])
        counted = np.zeros(records.shape)

        def tap(layer, first, **values):
            for chosen in values.get("choices", ()):
                counted[layer, chosen] += 1

        for first in range(0, len(ids), 48):
            one.trace(ids[first : first + 48], tap)
    assert np.allclose(counted / len(ids), records)
    calibrate(model, ids, destination=tmp_path / "neurons.flash", tokens=1200, steps=50)
    with (
        Model.open(tmp_path / "neurons.flash", context=48, neurons="predicted") as predicted,
        Model.open(model, context=48) as exact,
    ):
        differences = np.abs(predicted.logits(IDS) - exact.logits(IDS))
        assert np.median(differences) < 0.5 * np.abs(exact.logits(IDS)).mean()


def test_from_gguf_neurons_lie_apart_with_a_dtype(kit, tmp_path, cli):
    """Without one, matrices are kept bit for bit, experts are read whole, and convert says so."""
    gguf = next(kit.glob("*/q4_0.gguf"))
    ids = np.random.default_rng(2).integers(3, 96, 600)
    for name, options in (("kept", ()), ("apart", ("--dtype", "q4_0"))):
        code, _, err = cli("convert", gguf, tmp_path / name, *options)
        assert code == 0 and ("experts are read whole" in err) == (name == "kept"), err
        calibrate(tmp_path / name, ids, destination=tmp_path / f"{name}.flash", tokens=600, steps=9)
        with Bundle(tmp_path / f"{name}.flash") as bundle:
            assert bundle.has_predictors == (name == "apart")
            assert np.isfinite(logits_of(tmp_path / f"{name}.flash", IDS)[0]).all()
