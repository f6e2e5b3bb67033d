"""Every long work tells its caller how far it is, by one protocol."""

import numpy as np
import pytest

from flashinfer import Model, kernels
from flashinfer.calibration.calibrate import calibrate
from flashinfer.cli.common import progress_bars
from flashinfer.cli.run import demo_model
from flashinfer.formats.bundle.reader import verify
from flashinfer.oracle.kits.kit import write_kit
from flashinfer.study.perplexity import evaluate
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import opt_config


def write(path, progress):
    synthesize(path / "x.flash", opt_config(64, 2, 2, 128, 512, 64), "f32", progress=progress)


def check(path, progress):
    verify(demo_model(), progress)


def load(path, progress):
    with Model.open(demo_model(), context=8, progress=progress):
        pass


def foretell(path, progress):
    with Model.open(demo_model(), context=100) as model:
        # The last sequence has one token, from which nothing is predicted.
        evaluate(model, np.arange(5, 206), progress)


def find_predictors(path, progress):
    synthesize(path / "x.flash", opt_config(64, 2, 2, 128, 512, 512), "f32")
    ids = np.random.default_rng(0).integers(5, 500, 600)
    calibrate(path / "x.flash", ids, steps=0, threads=1, progress=progress)


def make_kit(path, progress):
    if kernels.in_use != "native":
        pytest.skip("kits are written with the compiled kernels")
    write_kit(path / "kit", ["gpt_oss"], progress)


WORKS = {
    "kit": make_kit,
    "write": write,
    "verify": check,
    "load": load,
    "evaluate": foretell,
    "calibrate": find_predictors,
}


@pytest.mark.parametrize("what", WORKS)
def test_progress_grows_until_all_is_done(what, tmp_path):
    calls = []
    WORKS[what](tmp_path, lambda *call: calls.append(call))
    assert {name for name, _, _ in calls} == {what}
    assert all(done <= total for _, done, total in calls)
    assert calls[-1][1] == calls[-1][2] > 0
    if what != "load":  # which is two works, of weights and of what the cache begins with
        assert len({total for _, _, total in calls}) == 1
        assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_bars_show_each_work_and_go(capsys, monkeypatch):
    monkeypatch.setattr("flashinfer.cli.common.DELAY", 0)
    with progress_bars() as progress:
        for done in range(3):
            progress("verify", done, 2)
        progress("load", 1, 2)  # an error in the middle leaves no bar behind
    shown = capsys.readouterr().err
    assert "verify:" in shown and "load:" in shown and shown.endswith("\r")
