import argparse
import json
import shutil
import typing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import DATA, SHARED
from flashinfer import Model, UserError
from flashinfer.calibration.calibrate import calibrate
from flashinfer.calibration.predictor_training import Observations, find_predictor, svd_predictors
from flashinfer.cli.run import demo_model
from flashinfer.course.chapters.predicting import layers_of
from flashinfer.formats.bundle.reader import Bundle, verify
from flashinfer.formats.bundle.writer import stored_tensors, write_bundle
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError
from flashinfer.paper.prefetch import NoPrefetch

RANDOM = np.random.default_rng(11)


def observations(n_tokens=1200, d=32, neurons=96, rank=6):
    """A layer whose inputs lie near a subspace, so that a predictor of that rank is good."""
    basis = RANDOM.standard_normal((rank, d))
    x = RANDOM.standard_normal((n_tokens, rank)) @ basis
    x = (x + 0.01 * RANDOM.standard_normal(x.shape) + 0.5).astype(np.float32)
    up = RANDOM.standard_normal((neurons, d)).astype(np.float32)
    z = x @ up.T
    bias = -np.quantile(z, 0.95, axis=0).astype(np.float32)
    fires = (z + bias > 0).T
    starts = np.arange(0, n_tokens, 100)
    return Observations(x, np.packbits(fires, axis=1), starts), up, bias, fires


def test_truncated_svd_is_the_best_low_rank_guess():
    """No other map of that rank comes nearer to the pre-activations, by Eckart and Young."""
    observed, up, bias, _ = observations()
    x = observed.x
    tiles = [(0, up[:50]), (50, up[50:])]
    for a, b, found_bias in svd_predictors(x, lambda: tiles, bias, unlike=0.0):
        z = x @ up.T
        found = x @ a.T @ b.T + found_bias - bias
        centred = z - z.mean(axis=0)
        singular = np.linalg.svd(centred, compute_uv=False)
        least = np.sqrt(np.sum(singular[len(a) :] ** 2))
        assert np.linalg.norm(found - z) <= 1.01 * least + 1e-3 * np.linalg.norm(z)


@pytest.mark.parametrize("steps", [0, 40])
def test_a_predictor_misses_no_more_than_it_may(steps):
    observed, up, bias, fires = observations()
    for missed in (0.02, 0.05, 0.3):
        found = find_predictor(observed, lambda: [(0, up)], bias, 64, missed, steps)
        says = found.scores(observed.x) > 0
        _, first, second = observed.split()
        for half in (first, second):
            active = fires[:, half]
            assert np.count_nonzero(active & ~says[:, half]) <= missed * active.sum() + 1e-9
        held_out = np.concatenate([first, second])
        assert found.predicted == pytest.approx(says[:, held_out].mean(), rel=1e-3)
        assert found.active == pytest.approx(fires[:, held_out].mean())
        assert found.predicted < 0.2  # far fewer than all


def test_held_out_tokens_are_not_those_it_was_fitted_on():
    observed, *_ = observations()
    parts = observed.split()
    assert sorted(np.concatenate(parts).tolist()) == list(range(1200))
    for part in parts:  # whole sequences
        assert len(part) % 100 == 0 and len(part) >= 200


def test_weights_that_are_zero():
    x = np.random.default_rng(0).standard_normal((50, 32)).astype(np.float32)
    rows, bias = np.zeros((96, 32), dtype=np.float32), np.ones(96, dtype=np.float32)
    maps = list(svd_predictors(x, lambda: [(0, rows)], bias))
    assert maps and all(np.isfinite(part).all() for one in maps for part in one)
    assert all((one.bias == 1).all() for one in maps)


def test_layers_where_nothing_fires():
    observed, up, bias, _ = observations()
    observed.fired[:] = 0
    found = find_predictor(observed, lambda: [(0, up)], bias, 64, 0.05, 10)
    assert found.active == 0 and found.missed == 0 and np.isfinite(found.bias).all()


def test_the_bundle_keeps_its_model_and_gains_predictors(plain, calibrated):
    verify(calibrated)
    ids = np.random.default_rng(0).integers(3, 96, 30)
    with Model.open(plain) as before, Model.open(calibrated, neurons="dense") as after:
        assert np.array_equal(before.logits(ids), after.logits(ids))
        assert set(after.bundle.tensors) - set(before.bundle.tensors) == {
            f"layers.{i}.predictor.{t}" for i in range(2) for t in ("a", "b", "bias")
        }
    with Bundle(calibrated) as bundle:
        layers = bundle.calibration.layers
    assert all(0 < layer.active <= 1 and layer.missed <= 0.05 for layer in layers)
    for layer in layers:
        assert len(layer.window_rows) == 8
        assert list(layer.window_rows) == sorted(layer.window_rows)


def test_calibrating_again_replaces_the_predictors(calibrated, tmp_path):
    path = tmp_path / "again.flash"
    ids = np.random.default_rng(1).integers(3, 96, 700)
    found = calibrate(calibrated, ids, path, tokens=700, steps=0, missed=0.2)
    verify(path)
    with Bundle(path) as bundle:
        assert bundle.calibration == found


def test_a_damaged_calibration_is_refused_and_can_be_made_again(calibrated, tmp_path):
    path = tmp_path / "x.flash"
    with Bundle(calibrated) as bundle:
        layers = tuple(replace(layer, rank=-1) for layer in bundle.calibration.layers)
        damaged = replace(bundle.calibration, layers=layers)
        write_bundle(path, stored_tensors(bundle), bundle.hf_config, bundle.source, damaged)
    with pytest.raises(FormatError, match="calibration is damaged; calibrate it again"):
        Bundle(path)
    found = calibrate(path, np.random.default_rng(7).integers(3, 96, 700), steps=0)
    with Bundle(path) as bundle:
        assert bundle.calibration == found


def test_what_is_measured_is_what_a_run_does(calibrated):
    """Active shares by calibrate's layer-wise pass and by the engine's own forward."""
    ids = np.random.default_rng(5).integers(3, 96, 1200)
    with Model.open(calibrated, neurons="dense") as model:
        ffn = model.layers[0].feed_forward
        tokens, fired = 0, 0
        rows = model.bundle.read("layers.0.ffn.bundles")

        class Counting(type(ffn)):
            def __call__(self, x, *others, **named):
                nonlocal tokens, fired
                tokens += len(x)
                fired += np.count_nonzero(x @ rows[:, :40].T + ffn.neurons.biases["up"] > 0)
                return super().__call__(x, *others, **named)

        ffn.__class__ = Counting
        for start in range(0, 48 * 25, 48):
            model.logits(ids[start : start + 48])
        share = fired / tokens / 72
        assert share == pytest.approx(model.bundle.calibration.layers[0].active, rel=0.1)


@pytest.mark.parametrize(
    "name", ["opt-plain", "opt-post-norm-projected", "falcon-new", "llama-relu-bias"]
)
def test_early_guesses_are_those_of_a_run(name, tmp_path):
    """The share of what a predictor names that it named one layer early, by the engine itself."""
    path, calibrated = tmp_path / "x.flash", tmp_path / "calibrated.flash"
    convert(DATA / name, path, "f32")
    ids = np.random.default_rng(5).integers(3, 96, 48 * 12)
    layers = calibrate(path, ids, calibrated, tokens=len(ids), steps=0).layers
    with Model.open(calibrated) as model:
        ffn, early = model.layers[1].feed_forward, []
        select, used, right = ffn.predictor.select, [], []

        class Guess(NoPrefetch):
            def begin(self, ffn, x, token, residual):
                early.append(select(x, residual).units)

        def noted(x, residual):
            selection = select(x, residual)
            used.append(len(selection.units))
            right.append(len(np.intersect1d(selection.units, early[-1])))
            return selection

        ffn.prefetch, ffn.predictor.select = Guess(), noted
        for start in range(0, len(ids), 48):
            model.reset()
            for token in ids[start : start + 48]:
                model.forward([token])
    assert layers[0].guessed == 0 < layers[1].guessed <= 1
    assert sum(right) / sum(used) == pytest.approx(layers[1].guessed, abs=0.01)


FIRES = {
    "llama-relu-bias": lambda gate, up: gate > 0,
    "prosparse": lambda gate, up: gate > 0.05,
    "bamboo": lambda gate, up: (gate > 0) & (up > 0),
    "persimmon": lambda gate, up: up > 0,
    "bitnet": lambda gate, up: gate > 0,
    "falcon-new": lambda gate, up: up > 0,
}


@pytest.mark.parametrize("name", FIRES)
def test_what_fires_in_other_architectures(name, tmp_path):
    """Counted from the weights and the inputs that the engine's own forward gives layer 0."""
    path, calibrated = tmp_path / "x.flash", tmp_path / "calibrated.flash"
    convert(DATA / name, path, "f32")
    ids = np.random.default_rng(5).integers(3, 96, 48 * 16)
    record = calibrate(path, ids, calibrated, tokens=len(ids), steps=0).layers[0]
    with Model.open(path) as model:
        ffn, shares = model.layers[0].feed_forward, []
        d = model.config.hidden_size
        rows = model.bundle.read("layers.0.ffn.bundles")

        class Counting(type(ffn)):
            def __call__(self, x, *others, **named):
                up_at = d if self.neurons.config.gated else 0
                up, gate = x @ rows[:, up_at : up_at + d].T, x @ rows[:, :d].T
                up += 0 if self.neurons.biases["up"] is None else self.neurons.biases["up"]
                gate += 0 if self.neurons.biases["gate"] is None else self.neurons.biases["gate"]
                shares.append(FIRES[name](gate, up).mean())
                return super().__call__(x, *others, **named)

        ffn.__class__ = Counting
        for start in range(0, len(ids), 48):
            model.logits(ids[start : start + 48])
    assert np.mean(shares) == pytest.approx(record.active, rel=0.1)
    assert record.missed <= 0.05
    with Model.open(calibrated) as model:
        assert model.plan.mode == "predicted"
        assert np.isfinite(model.logits(ids[:40])).all()


def test_silu_leaves_nothing_to_predict(tmp_path):
    convert(DATA / "llama-silu", tmp_path / "x.flash")
    with pytest.raises(UserError, match="silu, leaves no neuron silent; --target-sparsity"):
        calibrate(tmp_path / "x.flash", list(range(3, 96)) * 8)
    convert(DATA / "llama-relu-bias", tmp_path / "x.flash")
    with pytest.raises(UserError, match="relu, leaves neurons silent by itself"):
        calibrate(tmp_path / "x.flash", list(range(3, 96)) * 8, target_sparsity=0.5)


def silu(x):
    return x / (1 + np.exp(-x))


SHUT = {  # which neurons are taken as silent, of gate and up
    "threshold": lambda gate, up, cut: gate <= cut,
    "cats": lambda gate, up, cut: np.abs(silu(gate)) <= cut,
    "teal": lambda gate, up, cut: np.abs(silu(gate) * up) <= cut,
}


@pytest.mark.parametrize("method", SHUT)
@pytest.mark.parametrize("target", [0.3, 0.7])
def test_thresholds_for_models_that_have_no_silent_neurons(method, target, tmp_path, cli):
    path, sparse = tmp_path / "x.flash", tmp_path / "sparse.flash"
    convert(DATA / "llama-silu", path, "f32")
    ids = np.random.default_rng(5).integers(3, 96, 48 * 20)
    found = calibrate(
        path, ids, sparse, tokens=len(ids), steps=0, target_sparsity=target, method=method
    )
    verify(sparse)
    for layer in found.layers:
        assert layer.active == pytest.approx(1 - target, abs=0.06)
        assert layer.missed <= 0.05 and set(layer.tried) == {"svd"}
    with Model.open(path) as plain, Model.open(sparse) as default:
        assert default.plan.mode == "dense"  # thresholds are off unless asked for
        assert np.array_equal(plain.logits(ids[:40]), default.logits(ids[:40]))
    with Model.open(sparse, neurons="predicted") as model:
        assert model.stats.as_dict()["sparsity"] == {"method": method, "target": target}
        ffn, d = model.layers[0].feed_forward, model.config.hidden_size
        rows = model.bundle.read("layers.0.ffn.bundles")
        x = RANDOM.standard_normal((7, d)).astype(np.float32)
        gate, up = rows[:, :d] @ x.T, rows[:, d : 2 * d] @ x.T
        expected = np.where(SHUT[method](gate, up, ffn.neurons.cut[1]), 0, silu(gate) * up)
        filled = ffn.store.cache.memory, ffn.whole.offsets.ravel()
        apart = ffn.neurons.width * len(rows)
        a = ffn.neurons.activations(*filled, x, np.arange(len(rows)), apart=apart)
        np.testing.assert_allclose(a, expected, atol=1e-5)
        one = ffn.neurons.activations(*filled, x[:1], np.arange(len(rows)), apart=apart)
        assert np.array_equal(one[:, 0], a[:, 0])
        assert np.array_equal(model.logits(ids[:40])[7], token_by_token(model, ids[:8])[-1])
    code, _, err = cli("run", sparse, "--tokens", "5,6", "-n", "3", "--neurons", "predicted")
    assert code == 0 and f"not exact: {100 * target:.0f} % of the neurons" in err


def token_by_token(model, ids):
    model.reset()
    return [model.forward([token]) for token in ids]


@pytest.mark.parametrize("name", ["llama-relu-bias", "falcon-new"])
def test_predictors_that_others_trained(name, tmp_path):
    """In PowerInfer's form: a ReLU between, reading what the FFN's norm reads, a threshold."""
    torch = pytest.importorskip("torch")
    path, target, folder = tmp_path / "x.flash", tmp_path / "y.flash", tmp_path / "predictors"
    shutil.copytree(DATA / name, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "sparse_threshold": 0.25}))
    convert(tmp_path / "hf", path, "f32")
    ids = np.random.default_rng(5).integers(3, 96, 48 * 12)
    with pytest.raises(FormatError, match=r"model_0\.pt: does not exist"):
        calibrate(path, ids, target, tokens=576, predictor_from=folder)
    folder.mkdir()
    fcs = []
    for layer in range(2):
        fc1, fc2 = (RANDOM.standard_normal(s).astype(np.float32) for s in ((8, 40), (72, 8)))
        fcs.append((fc1.astype(np.float16), fc2.astype(np.float16)))
        tensors = {"fc1.weight": torch.tensor(fc1), "fc2.weight": torch.tensor(fc2)}
        torch.save(tensors, folder / f"model_{layer}.pt")
    found = calibrate(path, ids, target, tokens=576, predictor_from=folder)
    assert found.as_json()["predictor"] == {"between": "relu", "reads": "residual"}
    with Model.open(target) as model:
        assert model.plan.mode == "predicted"
        for layer, (fc1, fc2), record in zip(model.layers, fcs, found.layers, strict=True):
            residual = RANDOM.standard_normal((5, 40)).astype(np.float32)
            inner = np.maximum(residual @ fc1.astype(np.float32).T, 0)
            expected = inner @ fc2.astype(np.float32).T - 0.25
            scores = layer.feed_forward.predictor.scores(None, residual)
            np.testing.assert_allclose(scores, expected, atol=1e-3)
            assert 0.1 < record.predicted < 0.9 and record.missed > 0
        whole = model.logits(ids[:30])
        assert np.array_equal(token_by_token(model, ids[:30]), whole)
    (folder / "model_1.pt").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match=r"model_1\.pt: PyTorch cannot read it"):
        calibrate(path, ids, target, tokens=576, predictor_from=folder)
    torch.save({"fc1.weight": torch.zeros(8, 41), "fc2.weight": torch.zeros(72, 8)},
               folder / "model_1.pt")  # fmt: skip
    with pytest.raises(FormatError, match="the model has hidden size 40 and 72 neurons"):
        calibrate(path, ids, target, tokens=576, predictor_from=folder)


def test_the_predictor_that_is_asked_for(tmp_path):
    path = tmp_path / "x.flash"
    convert(DATA / "llama-relu-bias", path)
    ids = np.random.default_rng(5).integers(3, 96, 48 * 12)
    for kind, tried in (("svd", {"svd"}), ("trained", {"svd", "trained"}), ("better", None)):
        found = calibrate(path, ids, tmp_path / "y.flash", tokens=576, steps=5, predictor=kind)
        for layer in found.layers:
            shares = {name: share for name, (share, missed) in layer.tried.items()}
            assert tried is None or set(shares) == tried
            wanted = min(shares.values()) if kind == "better" else shares[kind]
            assert layer.predicted == wanted


def test_too_short_a_text(plain, tmp_path):
    with pytest.raises(UserError, match="96 tokens are too few"):
        calibrate(plain, list(range(3, 96)) + [5] * 7, tmp_path / "x.flash")
    assert not (tmp_path / "x.flash").exists()


def test_trained_model(tmp_path):
    """On real trained weights the figures are those that shared/data/README.md gives."""
    tokenizers = pytest.importorskip("tokenizers")
    if not SHARED.exists():
        pytest.skip("shared/data is not here")
    path = tmp_path / "x.flash"
    convert(SHARED / "stdlib-opt-9m", path)
    with Bundle(path) as bundle:
        tokenizer = tokenizers.Tokenizer.from_str(bundle.tokenizer_json())
    source = "".join(Path(m.__file__).read_text(encoding="utf-8") for m in (argparse, typing))
    found = calibrate(path, tokenizer.encode(source).ids, tokens=8192, steps=0).layers
    assert [layer.missed <= 0.05 for layer in found] == [True] * 6
    for layer in found[1:]:
        assert layer.predicted < 2.5 * layer.active < 0.2


def test_inputs_that_lie_anywhere_make_a_predictor_that_knows_more_of_them():
    """The more of them the SVD expects, the nearer it comes to their pre-activations, and the
    further it is from those of its own inputs."""
    observed, up, bias, _ = observations(rank=6)
    anywhere = np.random.default_rng(4).standard_normal(observed.x.shape).astype(np.float32)
    errors = []
    for unlike in (0.0, 0.2, 0.9):
        *_, (a, b, found) = svd_predictors(observed.x, lambda: [(0, up)], bias, (4,), unlike)
        errors.append([
            float(np.linalg.norm(x @ a.T @ b.T + found - x @ up.T - bias))
            for x in (observed.x, observed.x.mean(axis=0) + anywhere)
        ])  # fmt: skip
    own, others = zip(*errors, strict=True)
    assert sorted(own) == list(own) and sorted(others, reverse=True) == list(others)


def test_predictors_know_tokens_of_other_texts_and_the_record_is_of_its_own(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    with Bundle(demo_model()) as bundle:
        tokenizer = tokenizers.Tokenizer.from_str(bundle.tokenizer_json())
    licence = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    own, random = tokenizer.encode(licence).ids[:1536], np.random.default_rng(2)
    others, unfamiliar = random.integers(2, 4096, (2, 768)).tolist()
    layers, missed, active = layers_of(unfamiliar[:256]), {}, {}
    for name, further in (("alone", []), ("with others", others)):
        target = tmp_path / f"{name}.flash"
        found = calibrate(demo_model(), own, target, tokens=2048, steps=0, others=further)
        active[name] = np.mean([layer.active for layer in found.layers])
        with Model.open(target) as model:
            missed[name] = np.mean([
                np.mean(layer.feed_forward.predictor.scores(x, None)[x @ up.T + bias > 0] <= 0)
                for layer, (up, bias, x) in zip(model.layers, layers, strict=True)
            ])  # fmt: skip
    assert missed["with others"] < 0.5 * missed["alone"]
    # Random tokens fire far more neurons than the text: the record counts none of them.
    assert active["with others"] == pytest.approx(active["alone"], rel=0.3)


def test_too_short_a_text_is_not_made_up_for_by_others():
    with pytest.raises(UserError, match="100 tokens are too few"):
        calibrate(demo_model(), [5] * 100, "x.flash", others=[5] * 1000)
