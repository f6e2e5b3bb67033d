"""Against transformers, live: fresh random checkpoints of every variant."""

import os

import numpy as np
import pytest

from flashinfer import Model
from flashinfer.formats import mxfp4
from flashinfer.formats.convert import convert

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from make_checkpoints import (  # noqa: E402
    ENCODERS,
    OPT,
    VARIANTS,
    allowed,
    encoded,
    make,
    reference,
    save,
)
from safetensors.torch import load_file  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_logits(name, safe, tmp_path, twin):
    seed = int(os.environ.get("FUZZ_SEED", 7))  # the same at each run
    model = make(VARIANTS[name], seed)
    save(model, tmp_path, VARIANTS[name])
    if not safe:
        tensors = load_file(tmp_path / "model.safetensors")
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    convert(tmp_path, tmp_path / "x.flash", "f32")
    ids = np.random.default_rng(seed).integers(3, 96, 40)
    with Model.open(tmp_path / "x.flash", context=40) as ours:
        theirs = reference(model, ids)
        difference = np.abs(ours.logits(ids) - theirs).max()
    assert difference < allowed(model, theirs), f"seed {seed}"


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, tmp_path, twin):
    seed = int(os.environ.get("FUZZ_SEED", 7))  # the same at each run
    options, kind = ENCODERS[name]
    model = make(options, seed, kind=kind)
    save(model, tmp_path, options)
    convert(tmp_path, tmp_path / "x.flash", "f32")
    ids = np.random.default_rng(seed).integers(0, 96, 40)
    with Model.open(tmp_path / "x.flash") as ours:
        found = ours.encode([ids], logits=ours.config.has_head)[0]
    for part, values in encoded(model, ids).items():
        assert np.abs(getattr(found, part) - values).max() < 1e-4, f"seed {seed}"


def test_greedy_text(tmp_path):
    model = make(OPT, 7)
    model.save_pretrained(tmp_path)
    convert(tmp_path, tmp_path / "x.flash", "f32")
    prompt = [5, 17, 60]
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None,
            attention_mask=torch.ones(1, 3, dtype=torch.int64),
        )[0, 3:].tolist()  # fmt: skip
    with Model.open(tmp_path / "x.flash") as ours:
        assert list(ours.generate(prompt, 30, temperature=0, stop_at_eos=False)) == theirs


def test_mxfp4_as_transformers_decodes_it():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(1)
    blocks = random.integers(0, 256, (3, 8, 2, 16), dtype=np.uint8)
    scales = random.integers(110, 140, (3, 8, 2), dtype=np.uint8)
    theirs = convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    ).numpy()  # (experts, columns, rows)
    ours = mxfp4.decode(blocks.reshape(24, 2, 16), scales.reshape(24, 2)).reshape(3, 8, 64)
    assert np.array_equal(ours, theirs.swapaxes(1, 2))
