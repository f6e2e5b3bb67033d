"""Models whose layers differ: dense ones among those with experts, with and without a window."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from conftest import DATA, logits_of
from flashinfer import BudgetError, Model
from flashinfer.calibration.calibrate import calibrate
from flashinfer.formats.bundle.calibration import CAPACITIES, WINDOWS, LayerCalibration
from flashinfer.formats.bundle.layout import format_of, predictor_layout
from flashinfer.formats.bundle.reader import Bundle, verify
from flashinfer.formats.bundle.writer import new_tensor, stored_tensors, write_bundle
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError
from flashinfer.plan import profile
from flashinfer.plan.slot_shares import CachedLayer, nbytes, share_slots
from flashinfer.synth import synthesize

NAMES = ("qwen2-moe-dense", "qwen3-moe-dense", "dots1", "glm4-moe", "ernie4-5-moe")
DENSE = {"qwen2-moe-dense": [1], "qwen3-moe-dense": [0, 2], "dots1": [0], "glm4-moe": [0, 1],
         "ernie4-5-moe": [0, 2, 4]}  # fmt: skip
IDS = np.random.default_rng(6).integers(3, 96, 48 * 16)
GLM = {
    "model_type": "glm4_moe", "vocab_size": 600, "hidden_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 2048,
    "moe_intermediate_size": 2048, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 1,
    "first_k_dense_replace": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    """A synthetic GLM-4.5 of 54 MB in which two dense layers come before four of experts."""
    path = tmp_path_factory.mktemp("glm") / "x.flash"
    synthesize(path, GLM)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_is_what_the_config_says(name, tmp_path):
    convert(DATA / name, tmp_path / "x.flash", "f32")
    with Bundle(tmp_path / "x.flash") as bundle:
        dense = [i for i, layer in enumerate(bundle.config.layers) if not layer.ffn.router]
        assert dense == DENSE[name]
        for i, layer in enumerate(bundle.config.layers):
            assert (f"layers.{i}.router.weight" in bundle.tensors) == (i not in dense)
            assert bundle.bundles(i).rows == layer.ffn.neurons
            assert bundle.unit_bytes(i) == bundle.bundles(i).nbytes // layer.ffn.units
    with Model.open(tmp_path / "x.flash") as model:
        saved = np.load(DATA / name / "logits.npz")
        assert np.abs(model.logits(saved["ids"]) - saved["logits"]).max() < 1e-4


@pytest.mark.parametrize("changes", [{"first_k_dense_replace": 0}, {"first_k_dense_replace": 2}])
def test_a_checkpoint_with_other_layers_is_refused(changes, tmp_path):
    """Those that the config says have experts must have them, and the others must not."""
    folder = tmp_path / "hf"
    folder.mkdir()
    config = json.loads((DATA / "dots1" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    save_file(load_file(DATA / "dots1" / "model.safetensors"), folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"layers\.[01]\.mlp.* is missing"):
        convert(folder, tmp_path / "x.flash", "f32")


@pytest.mark.parametrize(
    "name, further, stranger",
    [
        ("glm4-moe", "model.layers.3.eh_proj.weight", "model.layers.4.x"),
        ("deepseek-v3", "model.layers.2.eh_proj.weight", "model.layers.3.x"),
        ("ernie4-5-moe", "model.mtp_linear_proj.0.weight", "model.layers.5.x"),
    ],
)
def test_layers_that_predict_a_further_token_are_left_out_and_it_is_said(
    name, further, stranger, tmp_path, cli
):
    folder = tmp_path / "hf"
    folder.mkdir()
    config = json.loads((DATA / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    tensors = load_file(DATA / name / "model.safetensors")
    further = {further: np.zeros((4, 8), np.float32)}
    save_file({**tensors, **further}, folder / "model.safetensors")
    code, _, err = cli("convert", folder, tmp_path / "x.flash", "--dtype", "f32")
    assert (
        code == 0
        and "layers after the last, which predict further tokens, are left out (tensors: 1)" in err
    )
    convert(DATA / name, tmp_path / "y.flash", "f32")
    found = [logits_of(tmp_path / f"{name}.flash", IDS[:20])[0] for name in "xy"]
    assert np.array_equal(*found)
    save_file({**tensors, stranger: further.popitem()[1]}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=re.escape(stranger)):
        convert(folder, tmp_path / "z.flash")


def test_no_budget_changes_a_bit_or_is_exceeded(glm, constant_rss):
    """From the least budget to all in memory: dense layers streamed and whole, experts in turns, in
    waves and whole."""
    ids = np.arange(5, 45)
    whole, single = logits_of(glm, ids, context=64)
    with pytest.raises(BudgetError) as caught:
        Model.open(glm, memory=1, context=64)
    least, seen = caught.value.least, set()
    for budget in range(least, least + (72 << 20), 4 << 20):
        with Model.open(glm, memory=budget, context=64) as model:
            plan = model.plan
            taken = plan.base + plan.resident + plan.kv_cache + plan.buffers + plan.working
            assert taken + plan.cache <= budget
            ways = [layer.feed_forward.whole.fits for layer in model.layers]
            assert all(plan.slots[i] in (0, 2048) for i in (0, 1))
            seen.add((sum(ways[:2]), plan.transit > 0, max(plan.slots[2:])))
        found = logits_of(glm, ids, memory=budget, context=64)
        assert np.array_equal(found[0], whole) and np.array_equal(found[1], single)
    dense, transit, slots = (set(values) for values in zip(*seen, strict=True))
    assert dense == {0, 1, 2} and transit == {True, False} and max(slots) == 8


def test_dense_layers_that_stay_are_not_read_again(glm):
    with Model.open(glm, context=64, window=1) as model:
        model.forward(np.arange(5, 25))
        caches = [layer.feed_forward.store.cache for layer in model.layers]
        assert [cache.misses for cache in caches[:2]] == [0, 0]
        assert all(cache.misses > 0 for cache in caches[2:])


@pytest.mark.parametrize("more", [4 << 20, 12 << 20])
def test_the_cost_model_knows_which_layers_stream(glm, more, constant_rss):
    """The bytes that it expects of a token are those that are read."""
    device = profile.find("laptop-nvme", glm)
    with pytest.raises(BudgetError) as caught:
        Model.open(glm, memory=1, context=256)
    options = {"memory": caught.value.least + more, "device": device, "draft": "off"}
    with Model.open(glm, context=256, **options) as model:
        tokens = list(model.generate([5], max_new_tokens=200, temperature=0))
        assert len(tokens) == 200
        found = model.stats.generation.bytes_per_token
        assert model.expected.bytes == pytest.approx(found, rel=0.2)


def test_calibration_records_the_layers_with_experts(tmp_path, cli):
    path, text = tmp_path / "x.flash", tmp_path / "calibrated.flash"
    convert(DATA / "dots1", path, "f32")
    found = calibrate(path, IDS, text, tokens=len(IDS))
    verify(text)
    assert [record is None for record in found.layers] == [True, False, False]
    with Bundle(text) as bundle:
        assert bundle.calibration == found
    code, out, _ = cli("inspect", text, "--memory", "1G")
    assert code == 0 and "72 neurons a layer (1 layer)" in out
    assert re.findall(r"^ +(\d)  .*$", out, re.MULTILINE) == ["1", "2"]
    whole = logits_of(path, IDS[:30])
    for found in (logits_of(text, IDS[:30]), logits_of(text, IDS[:30], warm=True)):
        assert np.array_equal(found, whole)


def test_neurons_of_all_layers_are_predicted_where_all_have_a_relu(tmp_path, twin):
    path, calibrated = tmp_path / "x.flash", tmp_path / "calibrated.flash"
    convert(DATA / "qwen3-moe-dense", path, "f32")
    record = calibrate(path, IDS, calibrated, tokens=len(IDS), missed=0.0)
    assert all(layer.rank > 0 and 0 < layer.predicted < 1 for layer in record.layers)
    ids = IDS[:40]
    whole, _ = logits_of(path, ids)
    found = [*logits_of(calibrated, ids), *logits_of(calibrated, ids, neurons="dense")]
    for rows in (7, 60):
        found += logits_of(calibrated, ids, rows)
    assert all(np.array_equal(whole, other) for other in found)


def test_a_mixture_without_silent_neurons_has_no_predictors(tmp_path):
    """A router's experts are not taken for the neurons that predictors would name."""
    path, wrong = tmp_path / "x.flash", tmp_path / "wrong.flash"
    convert(DATA / "mixtral", path, "f32")
    with Bundle(path) as bundle:
        specs = predictor_layout(bundle.config, [2, 2])
        new = [
            new_tensor(spec.name, format_of(spec), spec.shape,
                       lambda shape=spec.shape: [np.zeros(shape, np.float32)])
            for spec in specs
        ]  # fmt: skip
        write_bundle(wrong, [*stored_tensors(bundle), *new], bundle.hf_config, bundle.source)
    with pytest.raises(FormatError, match="no predictors"):
        Model.open(wrong)


def test_calibration_keeps_its_budget_where_layers_are_wide(tmp_path):
    """A dense layer's activations of the whole text would not fit."""
    path, budget = tmp_path / "x.flash", 240 << 20
    wide = {**GLM, "intermediate_size": 8192, "moe_intermediate_size": 128}
    synthesize(path, wide)
    code = (
        "import sys, numpy as np; from flashinfer.calibration.calibrate import calibrate;"
        "from flashinfer.plan.memory import peak_rss;"
        "ids = np.arange(8192) % 590 + 5;"
        f"calibrate({str(path)!r}, ids, {str(tmp_path / 'y.flash')!r}, memory_budget={budget});"
        "print(peak_rss())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) <= budget


# ---------------------------------------------------------------- sharing slots of unlike sizes


@st.composite
def layers(draw):
    """CachedLayers of unlike units, with miss curves that fall."""
    units, steps = draw(st.integers(1, 60)), len(CAPACITIES) - 1
    falls = draw(st.lists(st.integers(0, 9), min_size=steps, max_size=steps))
    needs = sorted(draw(st.lists(st.integers(1, units), min_size=WINDOWS, max_size=WINDOWS)))
    misses = tuple(float(sum(falls[i:])) for i in range(steps + 1))
    needed = tuple(float(n) for n in needs)
    record = LayerCalibration(0.1, 0.1, 0.0, 0, needed, needed, misses)
    least = draw(st.integers(0, min(3, units)))
    known = record if draw(st.booleans()) else None
    return CachedLayer(units, draw(st.integers(1, 50)), tuple(needs), least, known)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(layers(), max_size=6), st.integers(0, 6000), st.sampled_from(["window", "frecency"]),
    st.none() | st.integers(1, 12),
)  # fmt: skip
def test_shares_stay_within_the_room(given_layers, more, policy, window):
    least = nbytes(given_layers, [layer.least for layer in given_layers])
    slots, asked, holds = share_slots(given_layers, least + more, policy, window)
    assert nbytes(given_layers, slots) <= least + more
    for n, layer in zip(slots, given_layers, strict=True):
        assert layer.least <= n <= layer.units
    assert window is None or not given_layers or asked == window
    assert holds is None or all(
        n >= layer.needs[holds - 1] for n, layer in zip(slots, given_layers, strict=True)
    )
