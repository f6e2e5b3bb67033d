"""Experts with a ReLU: within those that the router chose, the neurons that a predictor names."""

import json

import numpy as np
import pytest

from conftest import DATA, keep_rows, logits_of
from flashinfer import BudgetError, Model, UserError
from flashinfer.calibration.calibrate import calibrate
from flashinfer.formats.bundle.reader import Bundle, verify
from flashinfer.formats.convert import convert
from flashinfer.paper.prefetch import NoPrefetch

IDS = np.random.default_rng(5).integers(3, 96, 48 * 16)
EXPERTS, CHOSEN, NEURONS = 8, 3, 24


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("apart") / "plain.flash"
    convert(DATA / "mixtral-relu", path, "f32")
    return path


@pytest.fixture(scope="module")
def calibrated(plain):
    """With predictors that miss nothing on the text they were made from."""
    path = plain.with_name("calibrated.flash")
    calibrate(plain, IDS, path, tokens=len(IDS), missed=0.0)
    verify(path)
    return path


def test_what_fires_is_counted_where_it_was_asked(plain, calibrated):
    """From the weights and the inputs that the engine's own forward gives the first layer."""
    with Model.open(plain) as model:
        ffn, fired = model.layers[0].feed_forward, 0
        rows = model.bundle.read("layers.0.ffn.bundles")
        gate = rows[:, : model.config.hidden_size].reshape(EXPERTS, NEURONS, -1)
        select = ffn.predictor.select

        def counting(x, residual):
            nonlocal fired
            for expert in np.argsort(-ffn.predictor.scores(x)[0])[:CHOSEN]:
                fired += np.count_nonzero(gate[expert] @ x[0] > 0)
            return select(x, residual)

        ffn.predictor.select = counting
        for start in range(0, len(IDS), 48):
            model.reset()
            for token in IDS[start : start + 48]:
                model.forward([token])
    with Bundle(calibrated) as bundle:
        record = bundle.calibration.layers[0]
    share = CHOSEN / EXPERTS
    assert record.active == pytest.approx(fired / len(IDS) / EXPERTS / NEURONS, rel=0.1)
    assert 0 < record.active < record.predicted < share and record.missed == 0
    assert record.window_rows_most[0] <= CHOSEN * NEURONS


def test_all_that_fires_is_all_that_counts(plain, calibrated, twin, monkeypatch, constant_rss):
    """The same bits by whole experts and by neurons, whatever the cache holds."""
    monkeypatch.setattr("flashinfer.paper.neuron_cache.NeuronCache.guesses_pay", True)
    ids = IDS[:40]
    whole, _ = logits_of(plain, ids)
    found = [*logits_of(calibrated, ids), *logits_of(calibrated, ids, neurons="dense")]
    for options in ({"threads": 3}, {"io": "buffered"}, {"window": 2}, {"cache": "lru"}):
        found += logits_of(calibrated, ids, **options)
    for rows in (7, 60, 150):
        found += logits_of(calibrated, ids, rows)
    with pytest.raises(BudgetError) as caught:
        Model.open(calibrated, memory=1)
    for more in (0, 1 << 20):
        found += logits_of(calibrated, ids, memory=caught.value.least + more)
    assert all(np.array_equal(whole, other) for other in found)


def test_only_those_neurons_are_read(plain, tmp_path):
    """A token reads what is predicted, and not whole experts."""
    read, calibrated = {}, tmp_path / "x.flash"
    share = calibrate(plain, IDS, calibrated, tokens=len(IDS), missed=0.4).layers[0].predicted
    for path in (plain, calibrated):
        with Model.open(path, window=1) as model:
            for layer in model.layers:
                keep_rows(layer.feed_forward, model.config.layers[0].ffn.units, 1)
                layer.feed_forward.prefetch = NoPrefetch()
            for token in IDS[:40]:
                model.forward([token])
            caches = [layer.feed_forward.store.cache for layer in model.layers]
            read[path] = sum(cache.misses for cache in caches) * model.bundle.unit_bytes(0)
    assert share < 0.8 * CHOSEN / EXPERTS
    assert 0 < read[calibrated] < 0.9 * read[plain]


def test_predictors_can_be_left_away(plain, tmp_path):
    path = tmp_path / "x.flash"
    found = calibrate(plain, IDS, path, tokens=len(IDS), predictor="none")
    assert sum(found.layers[0].uses) == pytest.approx(CHOSEN)
    with Model.open(path) as model:
        assert model.plan.mode == "routed"
    with pytest.raises(UserError, match="has no predictors; make them with flashinfer calibrate"):
        Model.open(path, neurons="predicted")


def test_from_the_command_line(cli, calibrated):
    code, out, _ = cli("inspect", calibrated)
    assert code == 0 and "8 experts, 3 of them a token" in out and "guessed early" in out
    assert "neurons: predicted; each neuron is" in out
    code, out, err = cli("run", calibrated, "--tokens", "5,6", "-n", "4", "--temp", "0")
    assert code == 0 and "neurons were in DRAM" in err, err
    for neurons, units in (("predicted", "neurons"), ("dense", "routed")):
        code, out, _ = cli(
            "plan", calibrated, "--device", "rpi5-sd", "--neurons", neurons, "--json", "-"
        )
        assert code == 0 and json.loads(out)["plan"]["mode"] in (neurons, units)
