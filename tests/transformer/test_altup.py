"""Several hidden states of a token, and gates of which only the largest count (Gemma 3n): whatever
way a text takes through a model, and wherever its weights are, a token has the same bits."""

import json
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import CONTEXT, drafted, share_passes, taken_back_anywhere

from conftest import DATA
from flashinfer import BudgetError, Model, UserError
from flashinfer.calibration.calibrate import calibrate
from flashinfer.formats.architectures import model_config
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import convert, outline
from flashinfer.formats.errors import FormatError
from flashinfer.formats.number_formats import Matrices
from flashinfer.oracle.kits.configs import FAR, NEAR, KitModel, gemma3n
from flashinfer.oracle.kits.hugging_face_form import write_hugging_face
from flashinfer.paper.gate_cut import cut_gates, ordered_sums

IDS = np.random.default_rng(0).integers(3, 96, 44).tolist()
NAMES = ("gemma3n", "gemma3n-other-state")
# FFNs of a megabyte, so that a small budget streams them.
LARGE = gemma3n(
    [NEAR, FAR, NEAR, FAR], hidden_size=64, num_attention_heads=4, intermediate_size=1500,
    activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0], num_kv_shared_layers=2,
    vocab_size_per_layer_input=40_000,
)  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def path(tmp_path_factory, request):
    """A bundle of a small model."""
    target = tmp_path_factory.mktemp("altup") / "x.flash"
    convert(DATA / request.param, target, "f32")
    return target


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def large(tmp_path_factory, request):
    """A bundle of a model whose FFNs may be streamed."""
    folder = tmp_path_factory.mktemp("large")
    config = {**LARGE, "hidden_size_per_layer_input": 32, "laurel_rank": 32, "head_dim": 32}
    config["intermediate_size"] = 1504
    write_hugging_face(KitModel("large", config), folder)
    convert(folder, folder / "x.flash", request.param)
    return folder / "x.flash"


@pytest.fixture(scope="module")
def expected(path):
    """The logits of IDS (T, vocab_size)."""
    with Model.open(path, context=CONTEXT, draft="off") as model:
        return model.logits(IDS)


def test_however_many_tokens_a_pass_takes(path, twin):
    with Model.open(path, context=CONTEXT) as model:
        whole = model.logits(IDS)
        for sizes in ([1] * 44, [2] * 22, [3, 40, 1], [43, 1]):
            model.reset()
            done, rows = 0, []
            for n in sizes:
                rows.append(model.forward(IDS[done : done + n], every=True))
                done += n
            assert np.array_equal(np.concatenate(rows), whole)


@settings(deadline=None, max_examples=6)
@given(st.data())
def test_tokens_are_taken_back_anywhere(path, expected, data):
    taken_back_anywhere(path, IDS, expected, data)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_drafts_change_nothing(path, share):
    drafted(path, IDS, share)


def test_texts_share_passes(path):
    share_passes(path, IDS)


def test_budget_changes_no_bit(large, twin, constant_rss):
    """From the least, where FFNs, attention and rows of tokens come from flash, to plenty."""
    with Model.open(large, context=CONTEXT, draft="off") as model:
        plenty = model.logits(IDS)
    with pytest.raises(BudgetError) as caught:
        Model.open(large, memory=1, context=CONTEXT)
    whole, layers, rows = set(), set(), set()
    for extra in (0, 1, 2, 40):
        budget = caught.value.least + (extra << 20)
        with Model.open(large, memory=budget, context=CONTEXT, draft="off") as model:
            whole.add(sum(layer.feed_forward.whole.fits for layer in model.layers))
            layers.add(model.plan.attention_layers)
            rows.add(model.plan.embeddings > 0)
            assert np.array_equal(model.logits(IDS), plenty), model.plan
            model.reset()
            single = np.stack([model.forward([token]) for token in IDS[:8]])
            assert np.array_equal(single, plenty[:8])
    assert min(whole) < 4 in whole and 4 in layers and rows == {True, False}


def test_ffns_whose_gates_are_cut_are_whole(large):
    with Bundle(large) as bundle:
        cut = [layer.ffn.gate_cut is not None for layer in bundle.config.layers]
        assert cut == [True, True, False, False]
        assert cut == [isinstance(bundle.bundles(i).format, Matrices) for i in range(4)]
        assert [layer.ffn.units for layer in bundle.config.layers] == [1, 1, 1504, 1504]


def test_a_config_alone_has_the_size_of_the_model(large, tmp_path):
    with Bundle(large) as bundle:
        dtype, config = bundle.bundles(3).format.name, bundle.hf_config
        size = large.stat().st_size
    assert abs(outline(config, tmp_path / "x.flash", dtype) - size) < 16_384


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(2, 9000), st.integers(0, 99))
def test_sums_have_one_order(tokens, n, seed):
    a = np.random.default_rng(seed).standard_normal((n, tokens), dtype=np.float32)
    sums = ordered_sums(a)
    single = [ordered_sums(np.ascontiguousarray(a[:, i : i + 1]))[0] for i in range(tokens)]
    assert np.array_equal(sums, single)
    np.testing.assert_allclose(sums, a.sum(axis=0, dtype=np.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_so_many_gates_are_left(share):
    deviations = NormalDist().inv_cdf(share)
    gates = np.random.default_rng(1).normal(2, 3, (20_000, 3)).astype(np.float32)
    wanted = np.maximum(gates - (gates.mean(axis=0) + deviations * gates.std(axis=0)), 0)
    cut_gates(gates, deviations)
    np.testing.assert_allclose(gates, wanted, atol=1e-4)
    np.testing.assert_allclose((gates > 0).mean(axis=0), 1 - share, atol=0.01)


@pytest.mark.parametrize("how", [{}, {"target_sparsity": 0.5}])
def test_calibration_is_refused(path, tmp_path, how):
    if not how:  # a ReLU, whose neurons could be silent
        folder = tmp_path / "relu"
        config = gemma3n([NEAR, FAR], num_kv_shared_layers=0, vocab_size_per_layer_input=96)
        folder.mkdir()
        write_hugging_face(KitModel("relu", {**config, "hidden_activation": "relu"}), folder)
        convert(folder, tmp_path / "relu.flash", "f32")
        path = tmp_path / "relu.flash"
    with pytest.raises(UserError) as caught:
        calibrate(path, np.tile(IDS, 30), tmp_path / "y.flash", **how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"altup_num_inputs": 1}, "hidden state 0 of 1"),
        ({"altup_active_idx": 4}, "hidden state 4 of 4"),
        ({"altup_active_idx": "first"}, "altup_active_idx"),
        ({"activation_sparsity_pattern": 0.95}, "activation_sparsity_pattern"),
        ({"activation_sparsity_pattern": [0.9]}, "activation_sparsity_pattern"),
        ({"activation_sparsity_pattern": [1.0] * 4}, "activation_sparsity_pattern has 1.0"),
        ({"intermediate_size": [72] * 3}, "intermediate_size"),
        ({"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input"),
        ({"num_kv_shared_layers": 15}, "num_kv_shared_layers is 15, with 4 layers"),
        ({"laurel_rank": 0}, "laurel_rank"),
    ],
)
def test_what_is_refused_is_named(changes, says):
    config = gemma3n([NEAR, FAR, NEAR, FAR], num_kv_shared_layers=2)
    model_config(config)
    with pytest.raises(FormatError, match=says):
        model_config({**config, **changes})


def test_the_first_layers_of_published_models_cut_their_gates():
    config = json.loads((DATA / "gemma3n" / "config.json").read_text())
    config |= {"num_hidden_layers": 30, "layer_types": None, "num_kv_shared_layers": 10}
    config |= {"activation_sparsity_pattern": None, "intermediate_size": 72}
    layers = model_config(config).layers
    cuts = [k.ffn.gate_cut for k in layers]
    assert cuts[:10] == [pytest.approx(1.6448536, abs=1e-6)] * 10 and cuts[10:] == [None] * 20
    assert [k.mixer.memory_of for k in layers[18:23]] == [None, None, 18, 18, 18]
    assert layers[24].mixer.memory_of == 19
