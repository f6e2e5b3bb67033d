"""The metadata of GGUF files: what changes nothing, what is refused, and what is taken."""

import dataclasses

import numpy as np
import pytest

from conftest import DATA
from flashinfer import Model
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError
from flashinfer.formats.sources.gguf_checkpoint import GgufCheckpoint
from flashinfer.formats.sources.gguf_metadata import refuse_strangers

gguf = pytest.importorskip("gguf")

from make_gguf import checkpoint_of, write_gguf  # noqa: E402

# What llama.cpp's converters write beside the keys of make_gguf, and nothing of it changes a logit.
WRITTEN = {
    "llama-silu": {
        "vocab_size": 96, "tensor_data_layout": "Meta AI original pth", "rope.scale_linear": 1.0,
        "attention.layer_norm_epsilon": 1e-5, "expert_count": 0, "expert_used_count": 0,
        "rope.scaling.finetuned": True, "attention.causal": True, "attention.scale": 0.0,
        "use_parallel_residual": False, "attention.clamp_kqv": 0.0, "logit_scale": 0.0,
    },
    "llama-yarn": {"rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0,
                   "rope.scaling.yarn_log_multiplier": 0.0},
    "mixtral": {"vocab_size": 96, "expert_gating_func": 1, "expert_weights_norm": True},
    "qwen2": {"pooling_type": 0, "attention.sliding_window": 1 << 20},
    "qwen3": {"pooling_type": 3, "vocab_size": 96},
    "gemma": {"vocab_size": 96},
    "falcon-7b": {"tensor_data_layout": "jploski", "use_parallel_residual": True},
    "phi": {"use_parallel_residual": True},
    "phi3": {"rope.scaling.attn_factor": 1.0},
    "nemotron": {"vocab_size": 96, "attention.layer_norm_rms_epsilon": 1e-5,
                 "rope.scaling.type": "none"},
    "olmoe": {"expert_weights_norm": False, "expert_weights_scale": 1.0},
    "qwen2-moe": {"expert_weights_norm": False, "expert_shared_count": 1},
    "qwen3-moe": {"expert_weights_norm": True, "leading_dense_block_count": 0,
                  "interleave_moe_layer_step": 1, "expert_group_count": 1},
    "granitemoe": {"vocab_size": 96, "rope.scaling.finetuned": True},
    "gpt-oss": {"expert_gating_func": 3, "attention.sliding_window_pattern": 2,
                "rope.freq_base_swa": 150000.0, "rope.scaling.yarn_beta_fast": 32.0,
                "rope.scaling.yarn_beta_slow": 1.0},
    "arcee": {"vocab_size": 96, "rope.scale_linear": 1.0},
    "gemma2": {"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 10000.0},
    "gemma3": {"attention.sliding_window_pattern": [True] * 5 + [False, True]},
    "dots1": {"expert_shared_feed_forward_length": 48},
    "hunyuan-moe": {"expert_shared_count": 1},
    "glm4-moe": {"nextn_predict_layers": 0},
    "granite": {"vocab_size": 96, "rope.scaling.finetuned": True},
    "ernie4-5-moe": {"expert_shared_feed_forward_length": 48, "expert_gating_func": 1},
    "olmo3": {"attention.sliding_window_pattern": [True] * 3 + [False, True],
              "rope.freq_base_swa": 1000.0, "rope.scaling.yarn_ext_factor": 1.0},
    "nemotron-h": {"rope.dimension_count": 4, "rope.freq_base": 10000.0, "vocab_size": 96},
    "nemotron-h-moe": {"expert_gating_func": 2},
    "granite-hybrid": {"vocab_size": 96, "rope.dimension_count": 10, "rope.freq_base": 10000.0},
    "granite-hybrid-rope": {"expert_shared_feed_forward_length": 56, "expert_count": 0},
    "deepseek-v2-lite": {"vocab_size": 96, "attention.temperature_scale": 0.0},
    "deepseek-v3": {"nextn_predict_layers": 0, "rope.scaling.yarn_ext_factor": 1.0,
                    "rope.scaling.yarn_beta_fast": 32.0, "expert_weights_norm": True},
}  # fmt: skip


def with_keys(name, path, keys):
    """The GGUF file of a checkpoint, with these keys of its architecture."""

    def add(writer):
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
                 str: writer.add_string, list: writer.add_array}  # fmt: skip
        for key, value in keys.items():
            negative = isinstance(value, int) and value < 0
            (writer.add_int32 if negative else kinds[type(value)])(f"{writer.arch}.{key}", value)

    return write_gguf(checkpoint_of(name, path.parent), path, metadata=add)


@pytest.mark.parametrize("name", WRITTEN)
def test_keys_that_change_nothing(name, tmp_path):
    convert(with_keys(name, tmp_path / "x.gguf", WRITTEN[name]), tmp_path / "x.flash", "f32")
    convert(with_keys(name, tmp_path / "y.gguf", {}), tmp_path / "y.flash", "f32")
    with Bundle(tmp_path / "x.flash") as one, Bundle(tmp_path / "y.flash") as other:
        assert one.config == other.config


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("llama-silu", "rope.scaling.yarn_beta_fast", 8.0),
        ("llama-silu", "rope.scaling.attn_factor", 2.0),
        ("llama-silu", "rope.scale_linear", 4.0),
        ("llama-silu", "attention.clamp_kqv", 1.0),
        ("llama-silu", "attn_logit_softcapping", 5.0),
        ("llama-silu", "final_logit_softcapping", 30.0),
        ("llama-silu", "attention.causal", False),
        ("llama-silu", "attention.scale", 0.5),
        ("llama-silu", "attention.scale", "a text"),
        ("llama-silu", "logit_scale", 0.25),
        ("llama-silu", "embedding_scale", 12.0),
        ("llama-silu", "use_parallel_residual", True),
        ("llama-silu", "attention.clamp_kqv", [1.0, 2.0]),
        ("llama-silu", "what_nobody_knows", 1),
        ("llama-yarn", "rope.scaling.yarn_attn_factor", 1.5),
        ("llama-yarn", "rope.scaling.yarn_ext_factor", 0.5),
        ("mixtral", "embedding_scale", 12.0),
        ("mixtral", "expert_weights_norm", False),
        ("mixtral", "expert_gating_func", 2),
        ("olmoe", "expert_weights_norm", True),
        ("olmoe", "expert_gating_func", 3),
        ("olmoe", "expert_weights_scale", 2.5),
        ("qwen2", "attention.sliding_window", 8),
        ("qwen3-moe", "leading_dense_block_count", 1),
        ("granitemoe", "rope.scaling.finetuned", False),
        ("mistral", "attention.sliding_window_pattern", 3),
        ("arcee", "attention.sliding_window", 8),
        ("gemma2", "rope.freq_base_swa", 500.0),
        ("gemma2", "attention.sliding_window_pattern", -1),
        ("gemma2", "attention.scale", 0.5),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("dots1", "attention.sliding_window", 8),
        ("granite", "rope.scaling.finetuned", False),
        ("hunyuan-moe", "expert_shared_count", 2),
        ("ernie4-5-moe", "expert_gating_func", 3),
        ("ernie4-5", "embedding_scale", 3.0),
        ("smollm3", "attention.sliding_window", 8),
        ("ministral3", "attention.temperature_length", 8),
        ("olmo2", "attention.clamp_kqv", 8.0),
        ("olmo3", "rope.freq_base_swa", 500.0),
        ("dots1", "nextn_predict_layers", 1),
        ("glm4-moe", "nextn_predict_layers", 3),
        ("granite-hybrid", "ssm.dt_b_c_rms", True),
        ("nemotron-h-moe", "expert_gating_func", 3),
        ("nemotron-h-moe", "moe_latent_size", 16),
        ("granite-hybrid", "attention.sliding_window", 8),
        ("glm4-moe", "rope.dimension_sections", [1, 1, 1, 0]),
        ("deepseek-v3", "nextn_predict_layers", 2),
        ("deepseek-v3", "attention.temperature_scale", 0.1),
        ("deepseek-v3", "attention.scale", 0.5),
        ("deepseek-v2-lite", "attention.sliding_window", 8),
    ],
)
def test_keys_that_would_change_the_result(name, key, value, tmp_path):
    """What is not read has to leave the result as it is."""
    path = with_keys(name, tmp_path / "x.gguf", {key: value})
    with pytest.raises(FormatError, match=rf"x\.gguf: metadata '[\w-]+\.{key}' is .* not supp"):
        convert(path, tmp_path / "x.flash", "f32")


def changed(writer, key, value):
    """Put ``value`` in the place of a key's, or remove the key (None)."""
    entry = writer.kv_data[0].pop(f"{writer.arch}.{key}", None)
    if value is not None:
        entry = entry or gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType.UINT32)
        writer.kv_data[0][f"{writer.arch}.{key}"] = dataclasses.replace(entry, value=value)


def bundle_config(name, tmp_path, **keys):
    """The config of a bundle of a GGUF file in which these keys are other ones."""

    def add(writer):
        for key, value in keys.items():
            changed(writer, key.replace("__", "."), value)

    path = write_gguf(checkpoint_of(name, tmp_path), tmp_path / "x.gguf", metadata=add)
    convert(path, tmp_path / "x.flash", "f32")
    with Bundle(tmp_path / "x.flash") as bundle:
        return bundle.config


@pytest.mark.parametrize("name", ["dots1", "glm4-moe"])
def test_another_gating_function_is_refused(name, tmp_path):
    with pytest.raises(FormatError, match=r"expert_gating_func' is 1, which is not supported"):
        bundle_config(name, tmp_path, expert_gating_func=1)


def test_a_gating_function_that_is_not_stated(tmp_path):
    """GLM's first files state none, and mean a sigmoid; of dots1 there are no such."""
    config = bundle_config("glm4-moe", tmp_path, expert_gating_func=None)
    assert config.layers[-1].ffn.router.scoring == "sigmoid"
    with pytest.raises(FormatError, match=r"expert_gating_func' is None, which is not supported"):
        bundle_config("dots1", tmp_path, expert_gating_func=None)


def test_gating_functions_of_deepseek(tmp_path):
    """V2's files state none, and mean a softmax, as those that state it; and so V3's a sigmoid."""
    stated = bundle_config("deepseek-v2-lite", tmp_path)
    assert stated == bundle_config("deepseek-v2-lite", tmp_path, expert_gating_func=None)
    assert stated.layers[-1].ffn.router.scoring == "softmax"
    router = bundle_config("deepseek-v3", tmp_path).layers[-1].ffn.router
    assert (router.scoring, router.choice_bias, router.group_by) == ("sigmoid", True, "top2")
    with pytest.raises(FormatError, match=r"expert_gating_func' is 3, which is not supported"):
        bundle_config("deepseek-v3", tmp_path, expert_gating_func=3)
    with pytest.raises(FormatError, match=r"norm_topk_prob true is not supported"):
        bundle_config("deepseek-v2-lite", tmp_path, expert_weights_norm=True)


def test_groups_of_deepseek_v2(tmp_path):
    """A group is worth its best expert where experts are chosen by a softmax."""
    groups = {"expert_group_count": 4, "expert_group_used_count": 2}
    router = bundle_config("deepseek-v2-lite", tmp_path, **groups).layers[-1].ffn.router
    assert (router.groups, router.groups_kept, router.group_by) == (4, 2, "max")


def test_rotary_positions_of_deepseek(tmp_path):
    """A tenth of what scores are weighed with is stated; without it llama.cpp's scores are others,
    as they are with positions that are divided alone."""
    mixer = bundle_config("deepseek-v2-lite", tmp_path).layers[0].mixer
    assert (mixer.yarn_weight, mixer.yarn_factor) == (0.7, 4.0)
    parameters = mixer.rotary.parameters
    assert parameters["mscale"] == parameters["mscale_all_dim"] == 0.7
    with pytest.raises(FormatError, match=r"yarn_log_multiplier' is None, which is not supported"):
        bundle_config("deepseek-v3", tmp_path, rope__scaling__yarn_log_multiplier=None)
    with pytest.raises(FormatError, match=r"scaling\.type' is 'linear', which is not supported"):
        bundle_config("deepseek-v3", tmp_path, rope__scaling__type="linear")


@pytest.mark.parametrize("key, says", [
    ("attention.kv_lora_rank", "kv_lora_rank is None"),
    ("attention.key_length_mla", "missing|shape|positive"),
    ("rope.dimension_count", "qk_rope_head_dim is None"),
])  # fmt: skip
def test_what_latent_attention_needs(key, says, tmp_path):
    with pytest.raises(FormatError, match=says):
        bundle_config("deepseek-v3", tmp_path, **{key.replace(".", "__"): None})


def test_what_mixtures_leave_out(tmp_path):
    """llama.cpp takes the weights of experts as they are."""
    config = bundle_config(
        "glm4-moe", tmp_path, expert_weights_norm=None, expert_weights_scale=None,
        expert_group_count=None, expert_group_used_count=None,
    )  # fmt: skip
    router = config.layers[-1].ffn.router
    assert (router.normalised, router.scale, router.groups, router.groups_kept) == (False, 1, 1, 1)


@pytest.mark.parametrize("pattern, slide", [
    (None, [1, 1, 1, 1, 1, 0, 1]), (6, [1, 1, 1, 1, 1, 0, 1]), (3, [1, 1, 0, 1, 1, 0, 1]),
    (1, [0] * 7), (0, [1] * 7),
])  # fmt: skip
def test_which_layers_have_a_window(pattern, slide, tmp_path):
    keys = {} if pattern is None else {"attention__sliding_window_pattern": pattern}
    config = bundle_config("gemma3", tmp_path, **keys)
    assert [bool(layer.attention.attention_window) for layer in config.layers] == list(
        map(bool, slide)
    )


def test_gemma_3_without_a_window(tmp_path):
    """All layers see all, and have the same rotary positions."""
    config = bundle_config("gemma3", tmp_path, attention__sliding_window=None)
    assert not any(layer.attention.attention_window for layer in config.layers)
    assert len({layer.attention.rotary.base for layer in config.layers}) == 1


@pytest.mark.parametrize("name, layers", [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_have_a_scale_of_their_own(name, layers, tmp_path):
    """llama.cpp knows them by their number of layers, as no key states it."""

    def add(writer):
        changed(writer, "block_count", layers)

    path = write_gguf(checkpoint_of(name, tmp_path), tmp_path / "x.gguf", metadata=add)
    with GgufCheckpoint(path) as checkpoint:
        assert checkpoint.config["query_pre_attn_scalar"] == 40 // 4
    with GgufCheckpoint(write_gguf(checkpoint_of(name, tmp_path), path)) as checkpoint:
        assert checkpoint.config["query_pre_attn_scalar"] == 16


def test_caps_that_gemma_2_leaves_out(tmp_path):
    config = bundle_config(
        "gemma2", tmp_path, attn_logit_softcapping=None, final_logit_softcapping=None,
        attention__sliding_window=None,
    )  # fmt: skip
    assert (config.layers[0].attention.score_cap, config.logit_cap) == (50.0, 30.0)
    assert config.layers[0].attention.attention_window == 4096


def test_mistral_without_temperature(tmp_path):
    """llama.cpp's conversion calls Mistral's later models mistral3, too."""
    config = bundle_config(
        "ministral3", tmp_path, attention__temperature_scale=None,
        rope__scaling__type=None, rope__scaling__factor=None,
        rope__scaling__yarn_log_multiplier=None,
    )  # fmt: skip
    attention = config.layers[0].attention
    assert (attention.temperature, attention.rotary.kind) == (None, "default")


def test_a_temperature_without_yarn(tmp_path):
    config = bundle_config(
        "ministral3", tmp_path, rope__scaling__type=None, rope__scaling__factor=None,
        rope__scaling__yarn_log_multiplier=None,
    )  # fmt: skip
    attention = config.layers[0].attention
    assert attention.rotary.kind == "default" and attention.temperature.length == 12


def test_gemma_3_has_linear_scaling_only(tmp_path):
    with pytest.raises(FormatError, match=r"rope\.scaling\.type' is 'yarn', which is not supp"):
        bundle_config("gemma3", tmp_path, rope__scaling__type="yarn")


@pytest.mark.parametrize("model, layers", [("glm4-moe", 3), ("deepseek-v3", 2)])
def test_layers_that_predict_further_tokens_are_left_out(model, layers, tmp_path):
    def add(writer):
        changed(writer, "block_count", layers + 1)
        writer.add_uint32(f"{writer.arch}.nextn_predict_layers", 1)
        for name in ("attn_norm", "nextn.eh_proj", "ffn_gate_exps"):
            writer.add_tensor(f"blk.{layers}.{name}.weight", np.ones(5, np.float32))

    path = write_gguf(DATA / model, tmp_path / "x.gguf", metadata=add)
    convert(path, tmp_path / "x.flash", "f32")
    convert(write_gguf(DATA / model, tmp_path / "y.gguf"), tmp_path / "y.flash", "f32")
    with Bundle(tmp_path / "x.flash") as one, Bundle(tmp_path / "y.flash") as other:
        assert one.config == other.config and one.config.num_hidden_layers == layers
    ids = np.arange(3, 30)
    with Model.open(tmp_path / "x.flash") as one, Model.open(tmp_path / "y.flash") as other:
        assert np.array_equal(one.logits(ids), other.logits(ids))


def test_the_bounds_of_yarn_are_taken(tmp_path):
    keys = {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0}
    convert(with_keys("llama-yarn", tmp_path / "x.gguf", keys), tmp_path / "x.flash", "f32")
    with Bundle(tmp_path / "x.flash") as bundle:
        parameters = bundle.config.layers[0].attention.rotary.parameters
    assert (parameters["beta_fast"], parameters["beta_slow"]) == (8.0, 2.0)


def test_a_factor_without_a_type_is_linear(tmp_path):
    """As llama.cpp has it."""
    path = with_keys("llama-silu", tmp_path / "x.gguf", {"rope.scaling.factor": 4.0})
    convert(path, tmp_path / "x.flash", "f32")
    with Bundle(tmp_path / "x.flash") as bundle:
        assert bundle.config.layers[0].attention.rotary.kind == "linear"
        assert bundle.config.layers[0].attention.rotary.parameters["factor"] == 4.0


def test_a_value_for_each_layer(tmp_path):
    """llama.cpp takes one where layers are alike, too."""
    key = "attention.head_count_kv"

    def of_layers(values):
        def add(writer):
            del writer.kv_data[0][f"{writer.arch}.{key}"]
            writer.add_array(f"{writer.arch}.{key}", values)

        return write_gguf(DATA / "llama-silu", tmp_path / "x.gguf", metadata=add)

    convert(of_layers([2, 2]), tmp_path / "x.flash", "f32")
    with Bundle(tmp_path / "x.flash") as bundle:
        assert [layer.attention.num_key_value_heads for layer in bundle.config.layers] == [2, 2]
    for values, says in (
        ([2, 4], r"\[2, 4\]; layers that differ in it are not supported for llama"),
        ([2, 2, 2], r"is \[2, 2, 2\], not a whole number for each of 2 layers"),
        ([2.0, 2.0], r"is \[2\.0, 2\.0\], not a whole number"),
    ):
        with pytest.raises(FormatError, match=rf"x\.gguf: metadata llama\.{key} .*{says}"):
            convert(of_layers(values), tmp_path / "y.flash", "f32")


def test_two_scalings_at_once(tmp_path):
    def add(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_tensor("rope_freqs.weight", np.ones(5, np.float32))

    path = write_gguf(DATA / "llama-silu", tmp_path / "x.gguf", metadata=add)
    with pytest.raises(FormatError, match=r"rope\.scaling\.type 'yarn' beside factors"):
        convert(path, tmp_path / "x.flash", "f32")


@pytest.mark.parametrize("value, head_dim", [(10**400, 64), (0.125, 10**400), (0.125, "many")])
def test_absurd_numbers_are_refused(value, head_dim):
    with pytest.raises(FormatError, match="scale"):
        refuse_strangers({"llama.attention.scale": value}, "llama", (), {"head_dim": head_dim})


def test_where_nemotron_h_states_one_epsilon_only(tmp_path):
    """llama.cpp takes the one for the other."""
    keys = {"attention__layer_norm_rms_epsilon": None, "attention__layer_norm_epsilon": 0.25}
    config = bundle_config("nemotron-h", tmp_path, **keys)
    assert config.norm.epsilon == 0.25 and config.layers[1].mixer.norm.epsilon == 0.25


@pytest.mark.parametrize("name, value", [("granite-hybrid", 77), ("nemotron-h", 61)])
def test_a_state_that_is_no_heads_is_refused(name, value, tmp_path):
    with pytest.raises(FormatError, match=r"ssm\.inner_size' is \d+, which is not supported"):
        bundle_config(name, tmp_path, ssm__inner_size=value)
