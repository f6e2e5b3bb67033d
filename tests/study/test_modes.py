"""Modes side by side: distances by hand from the models' own logits, and predictors' errors."""

import weakref

import numpy as np
import pytest

from conftest import DATA
from flashinfer import Model, UserError
from flashinfer.calibration.calibrate import calibrate
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import BudgetError
from flashinfer.oracle.trace import trace
from flashinfer.plan.options import Options
from flashinfer.study import modes
from flashinfer.study.divergence import Comparison
from flashinfer.study.ideal import predict_ideally, watch
from flashinfer.study.modes import compare_modes, errors_of

IDS = np.random.default_rng(3).integers(3, 96, 40)
CONTEXT = 15  # cuts IDS into three sequences
MODES = ["dense", "predicted", "ideal"]


def sequences(model):
    """[(logits (n, vocab), what follows (n,))] of IDS, each sequence from an empty context."""
    parts = [IDS[i : i + CONTEXT] for i in range(0, len(IDS), CONTEXT)]
    return [(model.logits(part)[:-1], part[1:]) for part in parts]


def distance(base, model):
    comparison = Comparison()
    for (of_base, following), (of_model, _) in zip(base, model, strict=True):
        for p, q, token in zip(of_base, of_model, following, strict=True):
            comparison.add(p, q, int(token))
    return comparison.distance()


@pytest.fixture(scope="module", params=["llama-silu", "mixtral-relu"])
def other(request, tmp_path_factory):
    """Calibrated: a model whose neurons are silent below a threshold only; experts with a ReLU."""
    path = tmp_path_factory.mktemp("modes") / "x.flash"
    convert(DATA / request.param, path, "f32")
    ids = np.random.default_rng(5).integers(3, 96, 600)
    target = 0.5 if request.param == "llama-silu" else None
    calibrate(path, ids, steps=0, tokens=600, target_sparsity=target)
    return path


def test_each_mode_as_its_own_logits_say(calibrated):
    seen = []
    found = compare_modes(
        calibrated, IDS.tolist(), Options(context=CONTEXT), lambda *done: seen.append(done)
    )
    with Model.open(calibrated, neurons="dense") as model:
        dense = sequences(model)
    with Model.open(calibrated, neurons="predicted") as model:
        predicted = sequences(model)
    assert [result.mode for result in found.results] == MODES
    assert found.tokens == len(IDS) - 3 and found.left_out is None
    assert found.results[0].distance is None
    assert found.results[1].distance == distance(dense, predicted)
    assert found.results[1].distance.kl_mean > 0
    for mode in MODES:
        assert [done for what, done, _ in seen if what == mode][-1] == found.tokens


def test_neurons_that_do_not_fire_add_nothing(calibrated):
    found = compare_modes(calibrated, IDS.tolist(), Options(context=CONTEXT)).results
    assert found[2].distance.kl_largest == 0  # with a ReLU, ideal prediction is exact
    assert found[2].perplexity == found[0].perplexity


def test_ideal_prediction_is_all_neurons_with_the_thresholds_in_force(other):
    with Model.open(other, neurons="dense") as model:
        for number, layer in enumerate(model.layers):
            layer.feed_forward.neurons.cut = model.bundle.cut(number)
        expected = model.logits(IDS)
    with Model.open(other, neurons="predicted") as model:
        predict_ideally(model)
        assert np.array_equal(model.logits(IDS), expected)
        model.reset()
        one_by_one = [model.forward([token]) for token in IDS]
        assert np.array_equal(np.stack(one_by_one), expected)


def test_thresholds_cost_something(other):
    found = compare_modes(other, IDS.tolist(), Options(context=CONTEXT)).results
    with Model.open(other) as model:
        cut = model.bundle.cut(0) is not None
    assert (found[2].distance.kl_mean > 0) == cut


@pytest.mark.parametrize("bias", [1e9, -1e9])
def test_a_predictor_that_names_all_or_nothing(calibrated, bias):
    with Model.open(calibrated, neurons="dense") as model:
        fires = [np.unpackbits(a) for a in trace(model, IDS, only=["*.active"]).values()]
    with Model.open(calibrated, neurons="predicted") as model:
        watched = watch(model)
        for layer in watched:
            layer.predictor.bias[:] = bias
        model.logits(IDS)
        errors = [errors_of(layer) for layer in watched]
    assert len(errors) == len(fires)
    for layer, fired in zip(errors, fires, strict=True):
        if bias > 0:
            assert (layer.active, layer.missed) == (fired.mean(), 0)
            assert layer.needless == pytest.approx(1 - fired.mean())
        else:  # what fires in later layers depends on the first
            assert (layer.missed, layer.needless) == (1, 0)
    assert bias < 0 or errors[0].active == fires[0].mean()


def test_watching_changes_nothing(other):
    with Model.open(other, neurons="predicted") as model:
        expected = model.logits(IDS)
    with Model.open(other, neurons="predicted") as model:
        watched = watch(model)
        assert np.array_equal(model.logits(IDS), expected)
        assert all(layer.tokens == len(IDS) and layer.fired for layer in watched)


@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        ("opt-plain", "dense", "has no predictors"),
        ("llama-silu", "dense", "no silent neurons"),
        ("mixtral", "routed", "the router of a mixture"),
    ],
)
def test_modes_that_a_model_does_not_have_are_left_out(tmp_path, name, mode, reason):
    convert(DATA / name, tmp_path / "x.flash", "f32")
    found = compare_modes(tmp_path / "x.flash", IDS.tolist(), Options(context=CONTEXT))
    assert [result.mode for result in found.results] == [mode]
    assert reason in found.left_out and found.layers == []
    with Model.open(tmp_path / "x.flash") as model:
        logits = sequences(model)
    assert found.results[0].perplexity.nats_per_token == pytest.approx(
        -np.mean(np.concatenate([log_chances(*sequence) for sequence in logits]))
    )


def log_chances(logits, following):
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    return exact[np.arange(len(following)), following]


def test_the_budget_has_room_for_one_model(calibrated, monkeypatch):
    models, alive = [], []

    class Watched(Model):
        def __init__(self, *args):
            alive.append(sum(model() is not None for model in models))
            super().__init__(*args)
            models.append(weakref.ref(self))

    monkeypatch.setattr(modes, "Model", Watched)
    compare_modes(calibrated, IDS.tolist(), Options(context=CONTEXT))
    assert alive == [0, 0, 0]


def test_a_budget_that_is_too_small_is_refused_at_once(calibrated):
    seen = []
    with pytest.raises(BudgetError):
        compare_modes(
            calibrated, IDS.tolist(), Options(memory="1M"), lambda *done: seen.append(done)
        )
    assert not seen


def test_where_no_temporary_file_can_be(calibrated, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with pytest.raises(UserError, match="/nowhere: no temporary file can be written"):
        compare_modes(calibrated, IDS.tolist(), Options(context=CONTEXT))
