"""The forms that the same checkpoint may have, and what stands in it that is no weight."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy

from flashinfer import Model
from flashinfer.formats import fp8
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError
from flashinfer.formats.number_formats import SOURCES
from flashinfer.oracle.kits.configs import like


def converted(folder, name="x.flash"):
    """The bytes of the bundle that a checkpoint gives."""
    path = folder.parent / name
    convert(folder, path, "f32")
    return path.read_bytes()


def change(folder, by):
    """Replace the tensors of a checkpoint by what ``by`` makes of them."""
    path = folder / "model.safetensors"
    tensors = by(safetensors.numpy.load_file(path))
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(values) for name, values in tensors.items()}, path
    )


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def fused(tensors):
    """As transformers holds experts: all of a layer's in two tensors."""
    found = {}
    for name in sorted(tensors):
        match = re.fullmatch(r"(.*)\.experts\.0\.(?:gate_proj|w1)\.weight", name)
        if match:
            parts = ("gate_proj", "up_proj", "down_proj")
            parts = parts if name.endswith("gate_proj.weight") else ("w1", "w3", "w2")
            base = match[1].replace("block_sparse_moe", "mlp")
            of = {
                part: np.stack([tensors[f"{match[1]}.experts.{i}.{part}.weight"] for i in range(8)])
                for part in parts
            }
            gate, up, down = of.values()
            found[f"{base}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
            found[f"{base}.experts.down_proj"] = down
        elif ".experts." not in name:
            found[name.replace("block_sparse_moe", "mlp")] = tensors[name]
    return found


def renamed(tensors):
    """Granite's, under the names that transformers has within."""
    names = {
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
        "router.layer.weight": "router.weight",
    }
    for old, new in names.items():
        tensors = {name.replace(old, new): values for name, values in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    "name, form",
    [("mixtral", fused), ("qwen3-moe", fused), ("qwen2-moe", fused), ("olmoe", fused),
     ("granitemoe", renamed)],
)  # fmt: skip
def test_experts_in_one_tensor(name, form, checkpoint):
    folder = checkpoint(name)
    apart = converted(folder)
    before = set(safetensors.numpy.load_file(folder / "model.safetensors"))
    change(folder, form)
    assert set(safetensors.numpy.load_file(folder / "model.safetensors")) != before
    assert converted(folder) == apart


def test_packed_ternary_weights_are_refused(checkpoint):
    """BitNet's, four to a byte, though the config does not name them."""
    folder = checkpoint("bitnet")
    name = "model.layers.0.mlp.up_proj.weight"
    change(folder, lambda tensors: {
        **tensors, name: np.zeros((18, 40), np.uint8), f"{name}_scale": np.ones(1, np.float32),
    })  # fmt: skip
    with pytest.raises(FormatError, match=r"up_proj.*\(18, 40\), the config says \(72, 40\)"):
        converted(folder)


def test_ernie_as_transformers_names_its_corrections(checkpoint):
    folder = checkpoint("ernie4-5-moe")
    before = converted(folder)
    change(folder, lambda found: {
        name.replace("mlp.moe_statics", "mlp.gate.moe_statics"): x for name, x in found.items()
    })  # fmt: skip
    assert converted(folder) == before


def test_buffers_are_no_weights(checkpoint):
    folder = checkpoint("llama-silu")
    before = converted(folder)
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32),
        "model.rotary_emb.inv_freq": np.ones(5, np.float32),
        "model.layers.0.self_attn.rotary_emb.cos_cached": np.ones((1, 1, 8, 10), np.float32),
        "model.layers.1.self_attn.masked_bias": np.array(-1e9, np.float32).reshape(1),
    }
    change(folder, lambda tensors: {**tensors, **buffers})
    assert converted(folder) == before


def test_gpt2_as_the_hub_has_it(checkpoint):
    """Without the model's name before each tensor's, and with masks beside the weights."""
    folder = checkpoint("gpt2")
    before = converted(folder)
    mask = np.tril(np.ones((1, 1, 48, 48), np.float32))
    masks = {f"h.{layer}.attn.bias": mask for layer in range(2)}
    masks["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
    change(folder, lambda found: {
        **{name.removeprefix("transformer."): values for name, values in found.items()}, **masks,
    })  # fmt: skip
    assert converted(folder) == before


@pytest.mark.parametrize("name", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
def test_a_matrix_the_other_way_round_is_refused(name, checkpoint):
    folder = checkpoint("gpt2-scaled")
    turned = f"transformer.h.1.{name}.weight"

    def by(tensors):
        values = tensors[turned]
        other = values[:, :-1] if values.shape[0] == values.shape[1] else values.T
        return {**tensors, turned: other}

    change(folder, by)
    with pytest.raises(FormatError, match=rf"{re.escape(turned)} has the shape .* the config says"):
        converted(folder)


def test_float64(checkpoint):
    folder = checkpoint("llama-silu")
    before = converted(folder)
    change(folder, lambda tensors: {n: v.astype(np.float64) for n, v in tensors.items()})
    assert converted(folder) == before


HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def test_a_tied_head_that_is_a_copy_is_none(checkpoint):
    folder = checkpoint("llama-gelu-tied")
    before = converted(folder)
    change(folder, lambda tensors: {**tensors, HEAD: tensors[EMBEDDINGS]})
    assert converted(folder) == before


@pytest.mark.parametrize("of", [lambda v: v + np.float32(1e-3), lambda v: v[:-1], np.zeros_like])
def test_a_tied_head_that_differs_is_refused(of, checkpoint):
    folder = checkpoint("llama-gelu-tied")
    change(folder, lambda tensors: {**tensors, HEAD: of(tensors[EMBEDDINGS])})
    with pytest.raises(FormatError, match=r"lm_head\.weight differs .*tie_word_embeddings"):
        converted(folder)
    assert not (folder.parent / "x.flash").exists()


def test_a_whole_file_goes_before_an_index(checkpoint):
    """As in transformers."""
    folder = checkpoint("llama-silu")
    before = converted(folder)
    other = {"weight_map": {HEAD: "other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(other))
    assert converted(folder) == before


def test_ends_of_text_that_are_none_are_refused_before_anything_is_written(checkpoint):
    folder = checkpoint("llama-silu")
    for value in ("x", 1.5, -1, [None], 10**400, True, {}):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(FormatError, match=r"generation_config\.json.*eos_token_id"):
            converted(folder)
    assert not (folder.parent / "x.flash").exists()


# ---------------------------------------------------------------------- FP8


def test_fp8_values():
    torch = pytest.importorskip("torch")
    raw = np.arange(256, dtype=np.uint8)
    theirs = torch.from_numpy(raw).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(SOURCES["F8_E4M3"].decode(raw), theirs, equal_nan=True)


def test_blocks_of_fp8():
    assert fp8.block_of((256, 384), (2, 3), [128, 128]) == (128, 128)
    assert fp8.block_of((40, 384), (1, 3), [128, 128]) == (40, 128)
    assert fp8.block_of((4, 256, 128), (4, 2, 1), [128, 128]) == (128, 128)
    for shape, scales in (
        ((256, 384), (3, 2)), ((192, 128), (2, 1)), ((128,), (1,)), ((128, 128), ()),
        ((4, 128, 128), (2, 1, 1)), ((0, 128), (0, 1)),
    ):  # fmt: skip
        assert fp8.block_of(shape, scales, [128, 128]) is None


def fp8_checkpoint(folder, model_type, **options):
    """One of transformers' models in FP8, with blocks of 16 by 8."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_checkpoints import make

    model = make(like(model_type, hidden_size=32, intermediate_size=48, **options), 3)
    model.save_pretrained(folder)
    path, block = folder / "model.safetensors", (16, 8)
    tensors = {}
    for name, values in safetensors.numpy.load_file(path).items():
        if not name.endswith("_proj.weight") or "shared_expert_gate" in name:
            tensors[name] = torch.from_numpy(values)
            continue
        shape = (values.shape[0] // block[0], block[0], values.shape[1] // block[1], block[1])
        blocks = torch.from_numpy(values).reshape(shape)
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        quants = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = quants.reshape(values.shape), scales
    pytest.importorskip("safetensors.torch").save_file(tensors, path)
    quantization = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 8]
    }  # fmt: skip
    change_config(folder, quantization_config=quantization)
    return folder


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "options",
    [{"model_type": "qwen3", "head_dim": 8},
     {"model_type": "qwen3_moe", "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 3,
      "moe_intermediate_size": 16}],
    ids=["dense", "experts"],
)  # fmt: skip
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_fp8_as_transformers_reads_it(options, safe, tmp_path):
    pytest.importorskip("accelerate")
    folder = fp8_checkpoint(tmp_path / "fp8", **options)
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = np.random.default_rng(1).integers(3, 96, 24)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)[None]).logits[0].numpy()
    if not safe:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    converted(folder)
    with Model.open(tmp_path / "x.flash") as ours:
        assert np.abs(ours.logits(ids) - theirs).max() < 1e-4


def test_fp8_of_another_form_is_refused(tmp_path):
    folder = fp8_checkpoint(tmp_path / "fp8", "qwen3", head_dim=8)
    converted(folder)
    for quantization in (
        {"quant_method": "fp8"}, {"quant_method": "fp8", "weight_block_size": [16]},
        {"quant_method": "fp8", "weight_block_size": [16, 0]},
        {"quant_method": "fp8", "weight_block_size": [32, 8]}, None, {"quant_method": "fbgemm_fp8"},
    ):  # fmt: skip
        change_config(folder, quantization_config=quantization)
        with pytest.raises(FormatError, match=r"FP8|quantization_config"):
            converted(folder)


# ---------------------------------------------------------------------- PyTorch's own files


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_parameters_and_old_files(zipped, checkpoint):
    torch = pytest.importorskip("torch")
    folder = checkpoint("llama-silu")
    before = converted(folder)
    path = folder / "model.safetensors"
    tensors = {
        name: torch.nn.Parameter(torch.from_numpy(values))
        for name, values in safetensors.numpy.load_file(path).items()
    }
    path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert converted(folder) == before


@pytest.mark.parametrize("kind", ["int32", "complex64", "sparse", "number", "nested", "key"])
def test_what_is_no_map_of_floats_is_refused(kind, checkpoint):
    torch = pytest.importorskip("torch")
    folder = checkpoint("llama-silu")
    path = folder / "model.safetensors"
    tensors = {n: torch.from_numpy(v) for n, v in safetensors.numpy.load_file(path).items()}
    path.unlink()
    head = tensors[HEAD]
    strange = {
        "int32": {HEAD: head.int()}, "complex64": {HEAD: head.to(torch.complex64)},
        "sparse": {HEAD: head.to_sparse()}, "number": {HEAD: 3}, "nested": {"model": {HEAD: head}},
        "key": {3: head},
    }  # fmt: skip
    torch.save({**tensors, **strange[kind]}, folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin"):
        converted(folder)
    assert not (folder.parent / "x.flash").exists()
