"""Models of text and images are converted as their text part, and nothing else is left out."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import DATA
from flashinfer import Model
from flashinfer.formats.architectures.wrappers import WRAPPERS, text_config
from flashinfer.formats.convert import convert, outline
from flashinfer.formats.errors import FormatError

# The wrapper, a checkpoint whose model is its text part, and tensors of other parts.
TOWER = ("vision_tower.a.weight", "multi_modal_projector.b.weight")
WRAPPED = [
    ("gemma3", "gemma3", TOWER),
    ("gemma3n", "gemma3n", ("vision_tower.a.weight", "embed_audio.b.weight")),
    ("gemma4", "gemma4-shared", ("vision_tower.a.weight", "embed_audio.b.weight")),
    ("gemma4", "gemma4-moe", ("audio_tower.a.weight", "embed_vision.b.weight")),
    ("mistral3", "ministral3", TOWER),
    ("llava", "llama-silu", TOWER),
    ("llava_next", "mistral", (*TOWER, "image_newline")),
    ("llava_onevision", "qwen2", (*TOWER, "image_newline")),
    ("internvl", "qwen3-moe", TOWER),
    ("lighton_ocr", "qwen3", ("vision_encoder.a.weight", "vision_projection.b.weight")),
    ("smolvlm", "llama-silu", ("vision_model.a.weight", "connector.b.weight")),
    ("idefics3", "llama-silu", ("vision_model.a.weight", "connector.b.weight")),
    ("lfm2_vl", "lfm2", TOWER),
    ("qwen2_vl", "qwen2", ("visual.a.weight",)),
    ("qwen2_5_vl", "qwen2", ("visual.a.weight",)),
    ("qwen3_vl", "qwen3", ("visual.a.weight",)),
    ("qwen3_vl_moe", "qwen3-moe", ("visual.a.weight",)),
    ("qwen3_5", "qwen3-5", ("visual.a.weight",)),
    ("qwen3_5_moe", "qwen3-5-moe", ("visual.a.weight",)),
]
# How checkpoints name the tensors of the text, of the output head, and of the others.
FORMS = {
    "new": ("model.language_model.", "lm_head.", "model."),
    "old": ("language_model.model.", "language_model.lm_head.", ""),
}
IMAGES = np.ones((2, 3), dtype=np.float32)
EXPERT = re.compile(r"(.*mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def wrapped(folder, model_type, name, others, form, **outer):
    """A checkpoint of a wrapper around one of tests/data."""
    model, head, other = FORMS[form]
    tensors = {
        (head if key.startswith("lm_head.") else model) + key.partition(".")[2]: values
        for key, values in load_file(DATA / name / "model.safetensors").items()
    }
    tensors |= {other + key: IMAGES for key in others}
    save_file(tensors, folder / "model.safetensors")
    text = json.loads((DATA / name / "config.json").read_text())
    text.pop("tie_word_embeddings", None)
    config = {"model_type": model_type, "text_config": text, "vision_config": {}, **outer}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type, name, others", WRAPPED)
def test_the_text_is_the_model_it_is_by_itself(model_type, name, others, form, tmp_path):
    wrapped(tmp_path, model_type, name, others, form)
    notes = []
    convert(tmp_path, tmp_path / "x.flash", "f32", note=notes.append)
    convert(DATA / name, tmp_path / "plain.flash", "f32")
    ids = np.arange(3, 23)
    with Model.open(tmp_path / "x.flash") as ours, Model.open(tmp_path / "plain.flash") as plain:
        assert np.array_equal(ours.logits(ids), plain.logits(ids))
    text = json.loads((DATA / name / "config.json").read_text())["model_type"]
    assert notes == [
        f"{tmp_path}: of {model_type} its text, {text}, is converted; what sees images is left out "
        f"(tensors: {len(others)})"
    ]


@pytest.mark.parametrize("turned", [True, False])
def test_experts_in_one_tensor_whose_matrices_may_be_turned(turned, tmp_path):
    """As Qwen3-VL's checkpoints have them, and as transformers may write them again."""
    wrapped(tmp_path, "qwen3_vl_moe", "qwen3-moe", (), "new")
    tensors, experts = load_file(tmp_path / "model.safetensors"), {}
    for name in list(tensors):
        if found := EXPERT.fullmatch(name):
            experts[found[1], int(found[2]), found[3]] = tensors.pop(name)
    for layer in {key[0] for key in experts}:
        every = range(1 + max(key[1] for key in experts))
        up = [np.concatenate([experts[layer, e, part] for part in ("gate", "up")]) for e in every]
        down = [experts[layer, e, "down"] for e in every]
        for part, matrices in (("gate_up_proj", up), ("down_proj", down)):
            stacked = np.stack(matrices)
            stacked = stacked.swapaxes(1, 2) if turned else stacked
            tensors[f"{layer}.{part}"] = np.ascontiguousarray(stacked)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["model_type"] = "qwen3_vl_moe_text"
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert(tmp_path, tmp_path / "x.flash", "f32")
    convert(DATA / "qwen3-moe", tmp_path / "plain.flash", "f32")
    ids = np.arange(3, 23)
    with Model.open(tmp_path / "x.flash") as ours, Model.open(tmp_path / "plain.flash") as plain:
        assert np.array_equal(ours.logits(ids), plain.logits(ids))


def test_what_is_not_known_is_refused(tmp_path):
    wrapped(tmp_path, "llava", "llama-silu", ("audio_tower.a.weight",), "new")
    with pytest.raises(FormatError, match=r"1 tensors that llama does not have: model\.audio_to"):
        convert(tmp_path, tmp_path / "x.flash", "f32")


def test_a_text_that_is_not_known_is_refused(tmp_path):
    wrapped(tmp_path, "llava", "llama-silu", (), "new")
    config = json.loads((tmp_path / "config.json").read_text())
    for text, reason in (
        (None, "text_config is None, not an object"),
        ({"model_type": "cohere2"}, "model_type 'cohere2' is not supported"),
        ({"model_type": "llava"}, "model_type 'llava' is not supported"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": text}))
        with pytest.raises(FormatError, match=reason):
            convert(tmp_path, tmp_path / "x.flash", "f32")


def test_a_config_alone_can_be_planned(tmp_path):
    text = json.loads((DATA / "llama-silu" / "config.json").read_text())
    sizes = [
        outline(config, tmp_path / "x.flash", "f16")
        for config in (text, {"model_type": "llava", "text_config": text})
    ]
    assert abs(sizes[0] - sizes[1]) < 5000  # the config, which is a part of the file


def test_the_outer_config_says_what_the_text_leaves_out():
    config = {"model_type": "gemma3", "text_config": {"hidden_size": 8}, "eos_token_id": [1, 106]}
    assert text_config(config) == {
        "model_type": "gemma3_text", "hidden_size": 8, "eos_token_id": [1, 106],
        "tie_word_embeddings": True,
    }  # fmt: skip


def test_a_config_without_a_text_config():
    """As those of Qwen2-VL and Qwen2.5-VL were first written."""
    fields = {"hidden_size": 8, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    text = text_config({"model_type": "qwen2_5_vl", "vision_config": {"depth": 2}, **fields})
    assert (text["model_type"], text["hidden_size"], text["rope_theta"]) == ("qwen2", 8, 1e6)
    assert text["rope_scaling"]["rope_type"] == text["rope_scaling"]["type"] == "default"
    assert "vision_config" not in text
    with pytest.raises(FormatError, match="text_config is None"):
        text_config({"model_type": "qwen3_vl", **fields})


def test_a_name_of_its_own_for_a_known_architecture():
    text = {"model_type": "qwen3_vl_text", "hidden_size": 8}
    assert text_config({"model_type": "qwen3_vl", "text_config": text}) == {
        "model_type": "qwen3", "hidden_size": 8, "max_position_embeddings": 128000,
        "rope_theta": 5e5, "tie_word_embeddings": True,
    }  # fmt: skip


# A small vision model of each kind, and sizes that its text and its images share.
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
VISION = {
    "llava_next": {**SIGLIP, "model_type": "clip_vision_model"},
    "llava": {**SIGLIP, "model_type": "clip_vision_model"},
    "vipllava": {**SIGLIP, "model_type": "clip_vision_model"},
    "internvl": {
        **SIGLIP, "model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14],
    },
    "mistral3": {**SIGLIP, "model_type": "pixtral", "head_dim": 8},
    "lighton_ocr": {**SIGLIP, "model_type": "pixtral", "head_dim": 8},
}  # fmt: skip
# Its heads are a quarter rotary; and of a gated delta net the last digits of float32 are not sure.
DELTA_NET = {
    "head_dim": 16, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 32, "linear_value_head_dim": 24, "num_experts": 8,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
}  # fmt: skip
VISION |= {
    name: {
        "model_type": f"{name}_vision" if name == "qwen3_5" else name, "depth": 1,
        "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 48,
        "num_position_embeddings": 16,
    }
    for name in ("qwen3_5", "qwen3_5_moe")
}  # fmt: skip
PARITY = [
    *((model_type, (*w.known_as, w.text)[0], None) for model_type, w in WRAPPERS.items()),
    ("gemma3", "gemma3_text", False),
    ("mistral3", "ministral3", False),
    ("llava", "llama", True),
]


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("original", [True, False], ids=["old names", "new names"])
@pytest.mark.parametrize("model_type, text, tied", PARITY)
def test_logits_are_those_of_transformers(model_type, text, tied, original, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(5)
    sizes = {
        "model_type": text, "vocab_size": 96, "hidden_size": 48, "intermediate_size": 72,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 12, "max_position_embeddings": 48, "sliding_window": 9, "pad_token_id": 1,
        "bos_token_id": 2, "eos_token_id": 2, "initializer_range": 0.2,
    }  # fmt: skip
    if model_type == "gemma3n":  # whose tower is timm's
        pytest.importorskip("timm")
        sizes["num_kv_shared_layers"] = 0
    unsure = model_type.startswith("qwen3_5")
    sizes |= DELTA_NET if unsure else {}
    if "_vl" in model_type and text != "lfm2":  # positions of three dimensions
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
        sizes |= {"rope_parameters": rope}
    outer = {} if tied is None else {"tie_word_embeddings": tied}
    options = {"vision_config": VISION.get(model_type, SIGLIP), "text_config": sizes, **outer}
    config = transformers.AutoConfig.for_model(model_type, **options)
    kind = transformers.AutoModelForImageTextToText
    model = kind.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path, save_original_format=original)
    convert(tmp_path, tmp_path / "x.flash", "f32")
    ids = np.random.default_rng(5).integers(3, 96, 30)
    model = model.double() if unsure else model
    with torch.no_grad():
        theirs = model(torch.tensor(ids)[None]).logits[0].numpy()
    with Model.open(tmp_path / "x.flash", context=30) as ours:
        most = 1e-4 * np.abs(theirs).max() if unsure else 1e-4
        assert np.abs(ours.logits(ids) - theirs).max() < most
