"""Configs from files that nobody vouches for: a ModelConfig, or one line."""

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_configs import OWN_CODE, random_config

from conftest import DATA, ENCODER_DATA
from flashinfer.formats.architectures import ARCHITECTURES, model_config
from flashinfer.formats.bundle.layout import layout
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.errors import FormatError
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.formats.layers.norm import NormConfig
from flashinfer.transformer.positions import RotaryPositions, alibi_table

CONFIGS = {
    path.parent.name: json.loads(path.read_text())
    for folder in (DATA, ENCODER_DATA)
    for path in folder.glob("*/config.json")
}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


STRANGE = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2, 3, 7, 1e-300, 1e300, 2**40, "", "relu", "yarn", [], [1], {},
        10**400, -(10**400), 1e308, 5e-324, 1e38, 1e-38, 1e30, math.nan, math.inf, -math.inf, "1",
        -0.0, 2.0, 1.5, "\ud800", "a\nb", nested(300), [None], [1e308, "x"], {"a": nested(200)},
        {"rope_type": 10**400}, [10**400], 1 << 31, (1 << 31) - 1, 1 << 63, 4096,
        ["sliding_attention"], ["full_attention", 3], {"quant_method": []},
    ]
)  # fmt: skip
ANYWHERE = ("is_causal", "per_layer_config", "quantization_config")


def test_every_architecture_has_a_checkpoint_here():
    kinds = {config["model_type"] for config in CONFIGS.values()}
    assert kinds == ARCHITECTURES.keys() - {"turbosparsemistral", "ministral"}


def places(config):
    """Every object in a config of which a value may be another."""
    found = [config]
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(key), dict):
            found.append(config[key])
            found += [value for value in config[key].values() if isinstance(value, dict)]
    return found


ROPE_KEYS = (
    "rope_type", "type", "factor", "rope_theta", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "truncate", "attention_factor", "low_freq_factor", "high_freq_factor",
    "short_factor", "long_factor", "original_max_position_embeddings", "partial_rotary_factor",
    "full_attention", "sliding_attention",
)  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(
    model_type=st.sampled_from(sorted(ARCHITECTURES)),
    seed=st.integers(0, 1 << 30),
    changes=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), STRANGE), max_size=3),
)
def test_strange_values_are_used_or_refused(model_type, seed, changes):
    """Warnings are errors here."""
    config = random_config(np.random.default_rng(seed), model_type)
    if model_type in OWN_CODE:
        config.setdefault("hidden_act", "relu")
    for place, key, value in changes:
        objects = places(config)
        chosen = objects[place % len(objects)]
        keys = (*ARCHITECTURES[model_type].DEFAULTS, *ANYWHERE) if chosen is config else ROPE_KEYS
        chosen[keys[key % len(keys)]] = copy.deepcopy(value)
    check(config)


def check(config):
    """A config gives a ModelConfig that the engine can use, or is refused in one line."""
    try:
        found = model_config(config)
    except FormatError as error:
        assert str(error).startswith("config: ") and "\n" not in str(error)
        assert len(str(error)) < 400
        return None
    assert isinstance(found, ModelConfig)
    layout(found)
    mixers = [layer.mixer for layer in found.layers]
    for rotary in {id(mixer.rotary): mixer.rotary for mixer in mixers}.values():
        if rotary and rotary.dim < 1 << 12:
            cos, sin = RotaryPositions(rotary, 64)([(3, 5)])
            assert cos.shape == sin.shape == (5, rotary.dim // 2)
            assert np.isfinite(cos).all() and np.isfinite(sin).all()
    first = mixers[0]
    if isinstance(first, AttentionConfig) and first.alibi and first.num_attention_heads < 1 << 12:
        assert np.isfinite(alibi_table(first.num_attention_heads, first.head_dim, 8)).all()
    return found


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_most_random_configs_are_used(model_type):
    """So that the test above changes something that works."""
    configs = [random_config(np.random.default_rng(seed), model_type) for seed in range(40)]
    if model_type in OWN_CODE:
        configs = [{"hidden_act": "relu", **config} for config in configs]
    assert sum(check(config) is not None for config in configs) >= 20


LLAMA = {
    "model_type": "llama", "hidden_size": 40, "num_attention_heads": 4, "num_hidden_layers": 2,
    "vocab_size": 96,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rope_theta": 1e308}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 5e-324}}, "factor"),
        ({"hidden_act": "\ud800"}, "hidden_act"),
        ({"head_dim": nested(400)}, "head_dim"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 100.0}}}, "full_attention"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
         "partial_rotary_factor"),
        ({"is_causal": False}, "is_causal"),
        ({"per_layer_config": {"1": {}}}, "per_layer_config"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}}, "use_rms_norm"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional"),
        ({"model_type": "gpt_oss", "swiglu_alpha": 1.0}, "swiglu_alpha"),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "use_sliding_window"),
        ({"model_type": "mistral", "layer_types": ["mamba"] * 2}, "layer_types"),
        ({"model_type": "gemma2", "num_key_value_heads": 4, "attn_logit_softcapping": 1e6},
         "attention soft cap"),
        ({"model_type": "gemma2", "num_key_value_heads": 4, "final_logit_softcapping": 1e-4},
         "logit soft cap"),
        ({"model_type": "gpt_neox", "head_dim": 16}, "head_dim 16"),
        ({"model_type": "gpt_neox", "rotary_pct": 0.1}, "cannot be rotary"),
        ({"model_type": "gpt2", "num_attention_heads": 7}, "num_attention_heads 7"),
        ({"model_type": "gpt2", "n_inner": 0}, "n_inner"),
        ({"model_type": "gpt2", "scale_attn_weights": 1}, "scale_attn_weights"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(changes, field):
    assert check(LLAMA) is not None
    with pytest.raises(FormatError, match=field):
        model_config({**LLAMA, **changes})


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({}, {"activation": "silu", "num_key_value_heads": 4, "max_position_embeddings": 2048}),
        ({"hidden_act": "quick_gelu"}, {"activation": "quick_gelu"}),
        ({"rms_norm_eps": 0}, {"norm": NormConfig("rms", 0.0)}),
        ({"partial_rotary_factor": 0.5, "norm_topk_prob": False, "sliding_window": 5},
         {"windows": (None, None)}),
        ({"eos_token_id": [3, 200], "bos_token_id": 96},
         {"eos_token_ids": (3,), "bos_token_id": None}),
        ({"model_type": "gemma", "num_key_value_heads": 4, "hidden_act": "relu"},
         {"activation": "relu"}),
        ({"model_type": "gemma", "num_key_value_heads": 4, "hidden_act": "gelu",
          "hidden_activation": "relu"}, {"activation": "gelu_tanh"}),
        ({"model_type": "gemma2", "hidden_act": "relu"},
         {"activation": "gelu_tanh", "score_cap": 50.0, "logit_cap": 30.0,
          "attention_scale": 256**-0.5, "windows": (4096, None)}),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 3.0}, {"score_cap": None}),
        ({"model_type": "mixtral", "num_key_value_heads": 4, "norm_topk_prob": False},
         {"normalised": True, "windows": (None, None)}),
        ({"model_type": "qwen3_moe", "num_local_experts": 9, "intermediate_size": "none"},
         {"experts": 9, "d_ffn": 768, "neurons": 9 * 768}),
        ({"model_type": "gpt_oss", "num_key_value_heads": 4, "hidden_act": "none"},
         {"windows": (128, None), "activation": "quick_gelu"}),
        ({"model_type": "qwen2_moe", "num_key_value_heads": 4, "use_sliding_window": True,
          "sliding_window": 7}, {"windows": (7, None)}),
        ({"model_type": "mistral", "num_key_value_heads": 4}, {"windows": (4096, 4096)}),
        ({"model_type": "gpt2", "n_embd": 96}, {"hidden_size": 40, "d_ffn": 160}),
        ({"model_type": "falcon", "n_embed": 48}, {"hidden_size": 48, "d_ffn": 192}),
    ],
)  # fmt: skip
def test_what_a_config_leaves_out(changes, wanted):
    found = model_config({**LLAMA, **changes})
    first = found.layers[0]
    parts = (found, first, first.attention, first.ffn, first.ffn.router)
    windows = tuple(layer.attention.attention_window for layer in found.layers)
    for key, value in wanted.items():
        holder = next((part for part in parts if hasattr(part, key)), None)
        assert (windows if key == "windows" else getattr(holder, key)) == value, key


def test_rotary_positions_where_a_config_says_nothing():
    def rotary(**changes):
        found = model_config({**LLAMA, "num_key_value_heads": 4, **changes})
        return found.layers[0].attention.rotary

    assert (rotary(model_type="gpt_oss").kind, rotary(model_type="gpt_oss").base) == ("yarn", 1.5e5)
    assert rotary(model_type="gpt_oss").parameters["factor"] == 32.0
    assert rotary(model_type="mixtral").base == 1e6
    both = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 50.0}
    found = rotary(rope_parameters={"rope_type": "dynamic", "rope_theta": 7.0}, **both)
    assert (found.kind, found.base, found.parameters["factor"]) == ("linear", 50.0, 2.0)
    factors = {"short_factor": [1.0] * 5, "long_factor": [2.0] * 5, "type": "su"}
    found = rotary(
        model_type="phi3", max_position_embeddings=8192,
        rope_scaling={**factors, "original_max_position_embeddings": 16},
    )  # fmt: skip
    assert found.kind == "longrope"  # phi3 looks for the original length beside, not here
    assert found.parameters["original_max_position_embeddings"] == 4096
    assert found.parameters["factor"] == 2.0


@pytest.mark.parametrize("value", [True, 1.5, "2", None])
def test_max_window_layers_is_a_whole_number(value):
    config = {**CONFIGS["qwen2"], "use_sliding_window": True, "max_window_layers": value}
    with pytest.raises(FormatError, match="max_window_layers is"):
        model_config(config)
