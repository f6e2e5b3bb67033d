"""Weights that are no numbers, and texts that would steer a terminal: said in one line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bundle import calibration, rewritten

from flashinfer import Model, UserError
from flashinfer.calibration.calibrate import calibrate
from flashinfer.formats.bundle.calibration import calibration_from_json
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import FormatError, printable
from flashinfer.generation.sampling import Sampler
from flashinfer.study.perplexity import evaluate

IDS = np.random.default_rng(5).integers(3, 96, 600)
WEIGHTS = ("embed_tokens.weight", "layers.0.q_proj.weight", "layers.1.ffn.bundles",
           "layers.0.ffn_norm.weight", "final_norm.weight")  # fmt: skip


def spoilt(source, path, name, value):
    """A copy of a bundle of which one tensor, but for its first values, is ``value``."""
    with Bundle(source) as bundle:
        tensor = bundle.tensors[name]
    raw = bytearray(source.read_bytes())
    count = tensor.nbytes // 4
    raw[tensor.offset : tensor.offset + 4 * count] = np.full(count, value, "<f4").tobytes()
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_no_numbers(plain, tmp_path, name, value, twin):
    """No warning either, which pytest makes an error of here."""
    path = spoilt(plain, tmp_path / "x.flash", name, value)
    with Model.open(path) as model:
        logits = model.logits(IDS[:5])
        finite = np.isfinite(logits).all()
        for temperature in (0, 1):
            tokens = model.generate(IDS[:5], 1, temperature, stop_at_eos=False)
            if np.isfinite(logits[-1]).all():
                assert len(list(tokens)) == 1
                continue
            with pytest.raises(UserError, match=r"no finite logits: that of token id \d+ is"):
                list(tokens)
        if not finite:
            with pytest.raises(UserError, match=r"no finite logits after token \d of the text"):
                evaluate(model, IDS[:5])
    assert not finite or name in ("layers.1.ffn.bundles", "layers.0.ffn_norm.weight")  # a ReLU
    if not finite and name != "final_norm.weight":  # which calibration does not ask
        with pytest.raises(UserError, match=r"x\.flash: layer \d cannot be calibrated"):
            calibrate(path, IDS, tokens=600, steps=2)


def test_the_command_warns_of_nothing(plain, tmp_path):
    path = spoilt(plain, tmp_path / "x.flash", "layers.0.q_proj.weight", np.inf)
    command = [sys.executable, "-m", "flashinfer", "run", path, "--tokens", "5,6", "-n", "3"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("flashinfer: error: the model gives no finite logits")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_sampling_wants_finite_logits(value):
    logits = np.float32([1, 2, value, 0])
    for temperature in (0, 0.8):
        with pytest.raises(UserError, match=f"token id 2 is {np.float32(value)}"):
            Sampler(temperature, seed=0)(logits)


@given(st.floats(0, 1e300), st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False),
                                     min_size=1, max_size=20))  # fmt: skip
def test_any_temperature_and_any_finite_logits(temperature, logits):
    logits = np.float32(logits)
    token = Sampler(temperature, 0, 1, seed=0)(logits)
    assert 0 <= token < len(logits)
    if temperature < 1e-300:
        assert logits[token] == logits.max()


def test_wrong_arguments_in_python(plain):
    with pytest.raises(UserError, match="seed -1"):
        Sampler(seed=-1)
    with (
        Model.open(plain) as model,
        pytest.raises(UserError, match="-1 of 0 tokens cannot be kept"),
    ):
        model.reset(-1)


# ---------------------------------------------------------------------- what a bundle says

LAYER = {
    "active": 0.1, "predicted": 0.2, "missed": 0.0, "rank": 4, "window_rows": [1.0] * 8,
    "window_rows_most": [2] * 8, "misses": [0.5] * 17, "guessed": 0.5, "surest": 0.5,
    "reads": 0.7, "threshold": 0.1,
}  # fmt: skip
GOOD = {"layers": [LAYER] * 2, "sparsity": {"method": "cats", "target": 0.5}}
JUNK = (None, True, "1", [], {}, -1, 10**400, 1e308, float("nan"), float("inf"), [1], "\ud800")


def places(value, path=()):
    """Every place in a calibration."""
    yield path
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


def with_junk(value, path, junk):
    if not path:
        return junk
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_junk(value[path[0]], path[1:], junk)
    return copy


def test_every_place_of_a_calibration_is_checked():
    assert calibration_from_json(GOOD, [0, 0]).as_json() == GOOD
    for path in list(places(GOOD))[1:]:
        for junk in JUNK:
            changed = with_junk(GOOD, path, junk)
            if (path[-1], junk) in (("sparsity", None), ("threshold", -1)):  # which are sound
                continue
            with pytest.raises(FormatError, match="calibrat"):
                calibration_from_json(changed, [0, 0])


def test_a_record_is_missing_only_where_a_layer_has_none():
    plain = {key: value for key, value in LAYER.items() if key != "threshold"}
    routed = {**plain, "uses": [0.5] * 4}
    found = {"text": "a", "tokens": 9, "layers": [None, plain, routed]}
    calibration = calibration_from_json(found, [None, 0, 4])
    assert calibration.as_json() == found and calibration.recorded == calibration.layers[1:]
    for experts in ([0, 0, 4], [None, None, 4], [None, 4, 4], [None, 0, 0], [None, 0, None]):
        with pytest.raises(FormatError, match="is damaged; calibrate it again"):
            calibration_from_json(found, experts)
    with pytest.raises(FormatError, match="not that of this model"):
        calibration_from_json(found, [None, 0])


@pytest.mark.parametrize("text", ["\x1b]0;red\x07", "\x1b[2J", "a\rb", "\u202e", "\x7f", "\ud800"])
def test_what_a_file_says_does_not_steer_the_terminal(cli, calibrated, tmp_path, text):
    with Bundle(calibrated) as bundle:
        found = {**bundle.calibration.as_json(), "text": text, "tokens": [text]}
    for layer in found["layers"]:
        layer.pop("tried", None)
    path = rewritten(calibrated, tmp_path / "x.flash", calibration(found))
    code, out, _ = cli("inspect", path)
    assert code == 0 and printable(text) in out and text not in out
    code, out, _ = cli("inspect", path, "--json", "-")
    assert code == 0 and json.loads(out)["calibration"]["text"] == text
    assert out.isascii()
    raw = {**json.loads(board()), "name": text, "note": text}
    (tmp_path / "x.json").write_text(json.dumps(raw))
    code, out, _ = cli("plan", path, "--device", tmp_path / "x.json")
    assert code == 0 and f"on {printable(text)} ({printable(text)})" in out and text not in out


def board():
    from flashinfer.plan import profile

    return profile.boards()["rpi5-sd"].read_text()


def test_a_predictor_of_rank_0(plain, calibrated, tmp_path):
    def change(header):
        for name in ("a", "b"):
            entry = header[f"layers.0.predictor.{name}"]
            begin = entry["data_offsets"][0]
            pad = next(e for n, e in header.items() if n.startswith("_pad")
                       and e["data_offsets"][0] == entry["data_offsets"][1])  # fmt: skip
            pad["data_offsets"][0] = begin
            pad["shape"] = [pad["data_offsets"][1] - begin]
            entry["data_offsets"] = [begin, begin]
            entry["shape"] = [0, 40] if name == "a" else [72, 0]
        del header["__metadata__"]["flashinfer.checksums"]

    path = rewritten(calibrated, tmp_path / "x.flash", change)
    with pytest.raises(FormatError, match=r"x\.flash: a predictor of rank 0"):
        Bundle(path)


@settings(max_examples=100, deadline=None)
@given(st.text(), st.integers(0, 1 << 70))
def test_a_line_is_a_line(text, number):
    assert "\n" not in str(UserError(f"{text}{number}")) and printable(text).isprintable()
