"""What Gemma 4's configs and GGUF files may say otherwise, and what of it is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import DATA
from flashinfer import Model
from flashinfer.formats.architectures import model_config
from flashinfer.formats.bundle.layout import layout
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError
from flashinfer.formats.sources.gguf_checkpoint import GgufCheckpoint
from flashinfer.oracle.kits.configs import FAR, MODELS, NEAR, gemma4
from flashinfer.oracle.kits.gguf_file import gguf_bytes
from flashinfer.oracle.kits.gguf_form import EXACT, gguf_metadata, gguf_tensors
from flashinfer.oracle.kits.weights import drawn

IDS = np.random.default_rng(2).integers(3, 96, 24)
HEADS = {"head_dim": 20, "num_key_value_heads": 1}


def of_layers(**options):
    """Of each layer the sizes of heads, the layer whose keys it reads, and its neurons."""
    layers = model_config(gemma4([NEAR, FAR, NEAR, FAR], **options)).layers
    return [
        (k.attention.head_dim, k.attention.num_key_value_heads, k.mixer.memory_of, k.ffn.d_ffn)
        for k in layers
    ]


def test_heads_of_each_kind():
    near, far = (12, 2, None, 72), (20, 2, None, 72)
    assert of_layers() == [near, far, near, far]
    one = (20, 1, None, 72)
    assert of_layers(num_global_key_value_heads=1) == [near, far, near, far]
    found = of_layers(num_global_key_value_heads=1, attention_k_eq_v=True)
    assert found == [near, one, near, one]
    found = of_layers(per_layer_config={"1": HEADS, "03": HEADS}, global_head_dim=99)
    assert found == [near, one, near, one]
    for nothing in ({}, None):  # not the same as where it is left out
        assert of_layers(per_layer_config=nothing) == [near] * 4


def test_the_last_layer_sees_all():
    layers = model_config(gemma4([NEAR, FAR, NEAR])).layers
    assert [k.attention.attention_window for k in layers] == [9, None, None]


def test_which_keys_are_read():
    found = of_layers(num_kv_shared_layers=2, use_double_wide_mlp=True)
    assert [one[2:] for one in found] == [(None, 72), (None, 72), (0, 144), (1, 144)]
    config = model_config(gemma4([FAR, NEAR, NEAR, FAR, NEAR, FAR], num_kv_shared_layers=3))
    assert [k.mixer.memory_of for k in config.layers] == [None] * 3 + [0, 2, 0]
    assert [k.attention.lends for k in config.layers] == [True, False, True] + [False] * 3


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers 3 leaves no keys"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers is 4, with 4 layers"),
        ({"num_kv_shared_layers": None}, "num_kv_shared_layers"),
        ({"vocab_size_per_layer_input": 95}, "vocab_size_per_layer_input 95 is less"),
        ({"hidden_size_per_layer_input": -1}, "hidden_size_per_layer_input"),
        ({"per_layer_config": {"1": HEADS}}, "per_layer_config lets layers of one"),
        ({"per_layer_config": {"4": HEADS}}, "per_layer_config is of layer '4' of 4"),
        ({"per_layer_config": {"1": {"sliding_window": 3}}}, "per_layer_config of 'sliding_wind"),
        ({"per_layer_config": [HEADS]}, "per_layer_config"),
        ({"rope_parameters": {FAR: {"rope_theta": 10.0}}}, "rope_parameters has no object slid"),
        ({"rope_parameters": {"rope_theta": 10.0}}, "rope_parameters has no object"),
        ({"enable_moe_block": True}, "num_experts"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types"),
        ({"hidden_activation": "tanh"}, "hidden_activation 'tanh'"),
    ],
)
def test_what_is_refused_is_named(changes, says):
    with pytest.raises(FormatError, match=says):
        model_config({**gemma4([NEAR, FAR, NEAR, FAR]), **changes})


def test_a_table_may_have_more_rows_than_there_are_tokens():
    config = model_config(gemma4([FAR], vocab_size_per_layer_input=200))
    (table,) = [spec for spec in config.tensors() if "per_layer" in spec.name]
    assert table.shape == (200, 256) and table.role == "embedding"


def test_keys_that_no_layer_has_a_use_for(tmp_path):
    """Checkpoints may have them of layers that read others', and of no other layer."""
    tensors = load_file(DATA / "gemma4-shared" / "model.safetensors")
    config = (DATA / "gemma4-shared" / "config.json").read_text()
    for layer, refused in ((4, False), (1, True)):
        folder = tmp_path / str(layer)
        folder.mkdir()
        (folder / "config.json").write_text(config)
        name = f"model.layers.{layer}.self_attn.{'v_norm' if refused else 'k_proj'}.weight"
        save_file({**tensors, name: np.ones((24, 40), np.float32)}, folder / "model.safetensors")
        if refused:
            with pytest.raises(FormatError, match=r"does not have: model\.layers\.1\.self_attn"):
                convert(folder, folder / "x.flash", "f32")
        else:
            convert(folder, folder / "x.flash", "f32")


def test_a_checkpoint_without_numbers_of_layers(tmp_path):
    """Each layer's number is 1 where a checkpoint has none."""
    logits = []
    for there in (True, False):
        folder = tmp_path / str(there)
        folder.mkdir()
        tensors = load_file(DATA / "gemma4" / "model.safetensors")
        for name in [n for n in tensors if n.endswith("layer_scalar")]:
            tensors[name] = np.ones(1, np.float32)
            if not there:
                del tensors[name]
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text((DATA / "gemma4" / "config.json").read_text())
        convert(folder, folder / "x.flash", "f32")
        with Model.open(folder / "x.flash") as model:
            logits.append(model.logits(IDS))
    assert np.array_equal(*logits)


def gguf_file(folder, name, **changes):
    """A GGUF file of the kit's model ``name`` with other metadata; None: without the key."""
    kit = next(model for model in MODELS if model.name == name)
    config = model_config(kit.hugging_face_config())

    def draw(n, shape):
        return drawn(config, "text", n, shape)

    tensors = gguf_tensors("gemma4_text", config, draw, layout(config))
    factors = np.full(16, 1e30, np.float32)
    factors[:8] = 1
    tensors["rope_freqs.weight"] = changes.pop("factors", factors)
    metadata = {**gguf_metadata("gemma4_text", config, "text"), "tokenizer.ggml.model": "no_vocab"}
    metadata |= {f"gemma4.{key}": value for key, value in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    path = folder / "x.gguf"
    path.write_bytes(gguf_bytes(metadata, tensors, "f16", exact=EXACT))
    return path


@pytest.mark.parametrize("name", ["gguf-gemma4", "gguf-gemma4-shared", "gguf-gemma4-moe"])
def test_a_gguf_file_is_the_model_that_it_was_made_of(name, tmp_path):
    kit = next(model for model in MODELS if model.name == name)
    with GgufCheckpoint(gguf_file(tmp_path, name)) as checkpoint:
        stated = {**kit.hugging_face_config(), "rms_norm_eps": float(np.float32(1e-6))}
        assert model_config(checkpoint.config).layers == model_config(stated).layers
        assert json.loads(json.dumps(checkpoint.config)) == checkpoint.config


def test_a_cap_that_a_gguf_file_leaves_out(tmp_path):
    """llama.cpp takes that of the published models; 0 is none."""
    caps = []
    for stated in ({}, {"final_logit_softcapping": None}):
        with GgufCheckpoint(gguf_file(tmp_path, "gguf-gemma4-moe", **stated)) as checkpoint:
            caps.append(model_config(checkpoint.config).logit_cap)
    assert caps == [None, 30.0]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"attention.value_length": 16}, "attention.value_length"),
        ({"attention.value_length_swa": 32}, "attention.value_length_swa"),
        ({"rope.dimension_count_swa": 8}, "rope.dimension_count_swa"),
        ({"rope.dimension_count": 16}, "rope.dimension_count 16"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "rope.scaling.type"),
        ({"attention.sliding_window_pattern": [True, False, True, True, False, True]},
         "attention.sliding_window_pattern"),
        ({"attention.sliding_window_pattern": [True, False, True, True, True, False]},
         "attention.sliding_window_pattern"),
        ({"feed_forward_length": [96, 96, 96, 192, 192, 96]}, "feed_forward_length"),
        ({"feed_forward_length": [96, 64, 96, 192, 192, 192]}, "feed_forward_length"),
        ({"attention.head_count_kv": [2, 2, 2, 1, 2, 2]}, "per_layer_config lets layers"),
        ({"attention.head_count_kv": None}, "num_key_value_heads is None"),
        ({"feed_forward_length": None}, "feed_forward_length"),
        ({"attention.shared_kv_layers": 9}, "attention.sliding_window_pattern|num_kv_shared"),
        ({"factors": np.array([1.0, 2.0] * 8, np.float32)}, "rope.scaling.type"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"altup.num_inputs": 4}, "altup.num_inputs"),
    ],
)  # fmt: skip
def test_metadata_that_is_refused_is_named(changes, says, tmp_path):
    path = gguf_file(tmp_path, "gguf-gemma4-shared", **changes)
    with pytest.raises(FormatError, match=says) as caught:
        convert(path, tmp_path / "x.flash")
    assert "\n" not in str(caught.value)
