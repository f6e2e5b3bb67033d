"""Layers without a feed-forward network among those that have one."""

import numpy as np
import pytest

from conftest import DATA, logits_of
from flashinfer import BudgetError, Model
from flashinfer.calibration.calibrate import calibrate
from flashinfer.formats.architectures import model_config
from flashinfer.formats.bundle.reader import Bundle, verify
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError
from flashinfer.plan import profile
from flashinfer.synth import synthesize

IDS = np.random.default_rng(6).integers(3, 96, 48 * 16)
CONFIG = {
    "model_type": "nemotron_h", "vocab_size": 600, "hidden_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 2048, "mamba_num_heads": 8,
    "mamba_head_dim": 32, "ssm_state_size": 32, "n_groups": 2, "moe_intermediate_size": 1024,
    "moe_shared_expert_intermediate_size": 512, "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize("pattern", ["M-MM-*-M", "MEMM*EMEM"])
@pytest.mark.parametrize("neurons", [None, "dense"])
def test_no_budget_changes_a_bit_or_is_exceeded(pattern, neurons, tmp_path, constant_rss):
    """Predicted, dense and routed, from the least budget to all in memory."""
    path, ids = tmp_path / "x.flash", np.arange(5, 45)
    synthesize(path, {**CONFIG, "hybrid_override_pattern": pattern})
    whole, single = logits_of(path, ids, context=64, neurons=neurons)
    with pytest.raises(BudgetError) as caught:
        Model.open(path, memory=1, context=64, neurons=neurons)
    least, alone = caught.value.least, set()
    for budget in range(least, least + (24 << 20), 3 << 20):
        options = {"memory": budget, "device": profile.find("laptop-nvme", path)}
        with Model.open(path, context=64, neurons=neurons, **options) as model:
            plan = model.plan
            taken = plan.base + plan.resident + plan.kv_cache + plan.buffers + plan.working
            assert taken + plan.cache <= budget
            assert np.isfinite(model.expected.total)
            alone = [i for i, layer in enumerate(model.layers) if not layer.config.ffn.neurons]
            assert len(alone) >= 2 and all(plan.slots[i] == 0 for i in alone)
        found = logits_of(path, ids, memory=budget, context=64, neurons=neurons)
        assert np.array_equal(found[0], whole) and np.array_equal(found[1], single)


@pytest.mark.parametrize("layout", ["trained", "coactivation"])
def test_calibration_goes_past_them(layout, tmp_path, twin):
    path, calibrated = tmp_path / "x.flash", tmp_path / "calibrated.flash"
    convert(DATA / "nemotron-h", path, "f32")
    record = calibrate(path, IDS, calibrated, tokens=len(IDS), missed=0.0, layout=layout)
    assert [layer is None for layer in record.layers] == [False, True, False]
    verify(calibrated)
    with Bundle(calibrated) as bundle:
        assert bundle.has_predictors and bundle.has_layout == (layout == "coactivation")
        assert not any(name.startswith("layers.1.predictor") for name in bundle.tensors)
    whole, _ = logits_of(path, IDS[:40])
    for neurons in ("predicted", "dense"):
        assert np.abs(logits_of(calibrated, IDS[:40], neurons=neurons)[0] - whole).max() < 1e-4


@pytest.mark.parametrize("pattern", ["-M-", "M--M", "ME-", "MM*"])
def test_other_orders_are_refused(pattern):
    with pytest.raises(FormatError, match=r"without a mixer|no layer has a feed-forward"):
        model_config({**CONFIG, "hybrid_override_pattern": pattern})
