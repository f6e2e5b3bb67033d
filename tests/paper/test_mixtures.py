"""Mixtures of experts: an expert is a unit of the same cache, reads and plan as a neuron is."""

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import DATA, keep_rows, logits_of
from flashinfer import BudgetError, Model, UserError
from flashinfer.calibration.calibrate import calibrate
from flashinfer.formats import mxfp4
from flashinfer.formats.bundle.reader import verify
from flashinfer.formats.convert import convert
from flashinfer.paper.prefetch import NoPrefetch
from flashinfer.plan import profile, setup
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import config_like

NAMES = [
    "olmoe",
    "qwen2-moe",
    "qwen3-moe",
    "mixtral",
    "granitemoe",
    "gpt-oss",
]  # 3 of 8 experts a token


@pytest.mark.parametrize("name", NAMES)
def test_mixtures_change_no_bit(tmp_path, twin, constant_rss, name):
    """Caches of one expert (waves, one after the other) to all but one, and policies; guesses."""
    path, ids = tmp_path / "x.flash", np.random.default_rng(4).integers(3, 96, 40)
    convert(DATA / name, path, "f32")
    whole, single = logits_of(path, ids)
    found = [single, *logits_of(path, ids, threads=3), *logits_of(path, ids, io="buffered")]
    for rows, window in itertools.product((1, 2, 3, 5, 7), (None, 2)):
        found += logits_of(path, ids, rows, window=window)
    with pytest.raises(BudgetError) as caught:
        Model.open(path, memory=1)
    found += logits_of(path, ids, memory=caught.value.least)
    assert all(np.array_equal(whole, other) for other in found)


def noted(ffn, rows):
    """Give a layer's cache ``rows`` rows; returns a list that will hold the units it chooses."""
    keep_rows(ffn, rows, None)
    select, chosen = ffn.predictor.select, []

    def noting(x, residual):
        selection = select(x, residual)
        chosen.extend(selection.units)
        return selection

    ffn.predictor.select = noting
    return chosen


def test_a_prompt_reads_each_expert_once(tmp_path):
    """And only those that some token chose; whatever the cache holds."""
    path, ids = tmp_path / "x.flash", np.random.default_rng(4).integers(3, 96, 40)
    convert(DATA / "olmoe", path, "f16")
    for rows, n in itertools.product((1, 2, 5, 7), (2, 3, 40)):
        with Model.open(path) as model:
            chosen = [noted(layer.feed_forward, rows) for layer in model.layers]
            before = model.flash.bytes_read
            model.forward(ids[:n])
            experts = sum(len(units) for units in chosen)
            caches = [layer.feed_forward.store.cache for layer in model.layers]
            assert sum(cache.misses for cache in caches) == experts
            assert sum(cache.hits for cache in caches) == 0
            read = model.flash.bytes_read - before - model.flash.bytes_streamed
            spans = [layer.feed_forward.store.cache.slot_bytes for layer in model.layers]
            assert read <= experts * spans[0]


def test_calibration(tmp_path, cli):
    """Experts counted in the model's own forward; then run, inspect and plan know of them."""
    path, calibrated = tmp_path / "x.flash", tmp_path / "calibrated.flash"
    convert(DATA / "qwen3-moe", path, "f16")
    ids = np.random.default_rng(5).integers(3, 96, 48 * 12)
    layers = calibrate(path, ids, calibrated, tokens=len(ids)).layers
    verify(calibrated)
    with Model.open(path) as model:
        chosen = [noted(layer.feed_forward, 8) for layer in model.layers]
        for layer in model.layers:  # which would ask the routers, too
            layer.feed_forward.prefetch = NoPrefetch()
        for start in range(0, len(ids), 48):
            model.reset()
            for token in ids[start : start + 48]:
                model.forward([token])
        for units, layer in zip(chosen, layers, strict=True):
            uses = np.bincount(units, minlength=8) / len(ids)
            np.testing.assert_allclose(layer.uses, uses, atol=1e-9)
            assert layer.active == pytest.approx(3 / 8)
    assert layers[0].guessed == 0 < layers[1].guessed <= 1
    code, out, _ = cli("inspect", calibrated)
    assert code == 0 and "8 experts, 3 of them a token" in out and "guessed early" in out
    code, out, err = cli("run", calibrated, "--tokens", "5,6", "-n", "4", "--temp", "0")
    assert code == 0, err
    with pytest.raises(UserError, match="takes no thresholds"):
        calibrate(path, ids, target_sparsity=0.5)


@pytest.fixture(scope="module")
def olmoe_like(tmp_path_factory):
    """32 experts of 768 KiB a layer."""
    path = tmp_path_factory.mktemp("mixture") / "x.flash"
    small = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512,
             "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000,
             "num_experts": 32, "num_experts_per_tok": 4}  # fmt: skip
    synthesize(path, {**config_like("olmoe-1b-7b", 256), **small})
    return path


@pytest.mark.parametrize("cache", ["frecency", "lru"])
def test_a_warm_start_changes_no_token_and_saves_reads(olmoe_like, tmp_path, cache):
    """In processes of their own, so that the same budget affords the same rows."""
    found = {}
    for warm in ("--warm", "--no-warm"):
        figures = tmp_path / f"{warm}.json"
        command = [
            sys.executable, "-m", "flashinfer", "run", olmoe_like, "--tokens", "300", "-n", "30",
            "--temp", "0", "--memory", "150M", "--cache", cache, warm, "--draft", "off",
            "--json", figures,
        ]  # fmt: skip
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        found[warm] = json.loads(figures.read_text())
    warm, cold = found["--warm"], found["--no-warm"]
    assert warm["token_ids"] == cold["token_ids"]
    assert 1 > warm["cache_hit_rate"] > cold["cache_hit_rate"] + 0.05
    assert warm["flash_bytes_per_token"] < cold["flash_bytes_per_token"]


def test_a_warm_start_needs_to_know(tmp_path):
    path = tmp_path / "x.flash"
    convert(DATA / "olmoe", path)
    with pytest.raises(UserError, match="calibrate finds it"):
        Model.open(path, warm=True)


def test_experts_in_mxfp4(tmp_path):
    """GPT-OSS as it is published: the same logits as from the values that its blocks stand for."""
    forms, random = {}, np.random.default_rng(6)
    for form in ("plain", "mxfp4"):
        forms[form] = tmp_path / form
        shutil.copytree(DATA / "gpt-oss", forms[form])
    tensors = load_file(DATA / "gpt-oss" / "model.safetensors")
    packed = dict(tensors)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors[name].shape
        shape = (experts, rows, columns // 32, 16)
        blocks = random.integers(0, 256, shape, dtype=np.uint8)
        scales = random.integers(122, 127, shape[:3], dtype=np.uint8)
        del packed[name]
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
        values = mxfp4.decode(blocks.reshape(-1, *shape[2:]), scales.reshape(-1, shape[2]))
        values = values.reshape(experts, rows, columns)
        tensors[name] = np.ascontiguousarray(values.swapaxes(1, 2))
    save_file(tensors, forms["plain"] / "model.safetensors")
    save_file(packed, forms["mxfp4"] / "model.safetensors")
    logits = []
    for folder in forms.values():
        convert(folder, tmp_path / "x.flash", "f32")
        logits.append(logits_of(tmp_path / "x.flash", np.arange(10, 40))[0])
    assert np.array_equal(*logits)


def test_mxfp4_values():
    """By the standard: e2m1, and a scale of 2^(byte - 127)."""
    blocks = np.full((1, 2, 16), 0x21, dtype=np.uint8)
    blocks[0, 1] = 0xF7
    values = mxfp4.decode(blocks, np.array([[127, 130]], dtype=np.uint8))
    assert values[0, :32].tolist() == [0.5, 1.0] * 16
    assert values[0, 32:].tolist() == [48.0, -48.0] * 16


def test_fewer_rows_than_layers(olmoe_like, tmp_path):
    """Not one expert for each layer: they take turns. Less than one is refused, with the least."""
    figures = {}
    for budget in ("4G", "least"):
        command = [sys.executable, "-m", "flashinfer", "run", str(olmoe_like), "--tokens",
                   "300,301,302", "-n", "8", "--temp", "0", "-c", "32", "--memory"]  # fmt: skip
        if budget == "least":
            refused = subprocess.run([*command, "30M"], capture_output=True, text=True)
            assert refused.returncode == 1 and "the least for a context" in refused.stderr
            budget = refused.stderr.split()[-1]
        path = tmp_path / "figures.json"
        run = subprocess.run(
            [*command, budget, "--json", str(path)], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        figures[budget] = json.loads(path.read_text())
    plenty, least = figures.values()
    assert least["token_ids"] == plenty["token_ids"]
    assert plenty["cache_hit_rate"] == 1 and least["cache_hit_rate"] < 0.2
    assert least["peak_rss_bytes"] <= least["memory_budget_bytes"]


@pytest.mark.parametrize("transit", [1, 2, 3, 5])
def test_slots_in_transit_change_no_bit(olmoe_like, twin, monkeypatch, transit):
    """Layers with slots for a token's experts, for some of them, and for none; prompts and single
    tokens."""
    ids = np.arange(300, 330)
    whole, single = logits_of(olmoe_like, ids)
    make_plan = setup.make_plan

    def planned(bundle, wanted, slot_bytes, base):
        plan = make_plan(bundle, wanted, slot_bytes, base)
        each = slot_bytes[0]
        return replace(
            plan, slots=(8, 0, 1, 3), transit=transit * each, cache=(12 + transit) * each
        )

    monkeypatch.setattr(setup, "make_plan", planned)
    with Model.open(olmoe_like, context=64) as model:
        caches = [layer.feed_forward.store.cache for layer in model.layers]
        assert [cache.capacity for cache in caches] == [8, 0, 1, 3]
        assert all(cache.transit == min(transit, 4) for cache in caches)
    for options in ({}, {"window": 2}, {"cache": "lru"}):
        found = logits_of(olmoe_like, ids, context=64, **options)
        assert np.array_equal(found[0], whole) and np.array_equal(found[1], single)


@pytest.mark.parametrize("slots", [3, 9, 40])
def test_the_bytes_expected_of_a_small_cache_are_those_read(olmoe_like, slots, constant_rss):
    """With less than one token's experts in each layer, and with more; budgets hold."""
    device = profile.find("laptop-nvme", olmoe_like)
    with pytest.raises(BudgetError) as caught:
        Model.open(olmoe_like, memory=1, context=256)
    budget = caught.value.least + slots * (900 << 10)
    options = {"context": 256, "device": device, "draft": "off"}
    with Model.open(olmoe_like, memory=budget, **options) as model:
        plan = model.plan
        held = [n * size for n, size in zip(plan.slots, plan.slot_bytes, strict=True)]
        assert plan.cache == sum(held) + plan.transit
        taken = plan.base + plan.resident + plan.kv_cache + plan.buffers + plan.working
        assert taken + plan.cache <= budget
        assert (min(plan.slots) < 4) == (plan.transit > 0) == (slots < 40)
        list(model.generate(range(300, 340), 100, temperature=0, stop_at_eos=False))
        found = model.stats.generation.bytes_per_token
        assert found == pytest.approx(model.expected.bytes, rel=0.06)


def test_what_a_mixture_says(tmp_path, cli):
    path = tmp_path / "x.flash"
    code, _, err = cli("convert", DATA / "olmoe", path)
    assert code == 0 and err.splitlines()[-1] == f"Next: flashinfer calibrate {path} --text FILE"
    code, _, err = cli("run", path, "--tokens", "5", "--neurons", "predicted")
    assert code == 1 and "leave --neurons away" in err
    code, _, err = cli("run", path, "--tokens", "5", "-n", "3", "--neurons", "dense")
    assert code == 0 and "% of experts were in DRAM" in err
