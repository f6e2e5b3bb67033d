"""A model of the kit as a Hugging Face checkpoint: config.json and model.safetensors."""

import json
from pathlib import Path

import numpy as np

from flashinfer.formats import mxfp4
from flashinfer.formats.architectures import architecture, model_config
from flashinfer.formats.arrays import AnyArray
from flashinfer.oracle.kits.configs import KitModel
from flashinfer.oracle.kits.draws import raw_bytes
from flashinfer.oracle.kits.safetensors_file import safetensors_bytes
from flashinfer.oracle.kits.weights import Tensors, checkpoint_tensors, hugging_face_form

UNIT_SCALE = 127  # the byte of an MXFP4 scale of 1


def write_hugging_face(model: KitModel, folder: Path) -> None:
    """Write config.json and model.safetensors of ``model`` to a directory."""
    fields = model.hugging_face_config()
    module, config = architecture(fields), model_config(fields)
    form = hugging_face_form(model, config, module)
    stored: Tensors = {}
    for name, values in checkpoint_tensors(model, config, form).items():
        if name.endswith("_mxfp4"):
            stored |= _mxfp4(name.removesuffix("_mxfp4"), values, model.name)
            continue
        if getattr(module, "NORM_LESS_ONE", False) and name.endswith("norm.weight"):
            values = values - np.float32(1)
        # Experts' biases have two dimensions, and are never turned.
        if getattr(module, "EXPERTS_TURNED", False) and values.ndim == 3:
            values = values.swapaxes(1, 2)
        stored[name] = values
    text = json.dumps(fields, indent=2) + "\n"
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(stored, {"format": "pt"}))


def _mxfp4(name: str, values: AnyArray, label: str) -> Tensors:
    """Random blocks and scales of a tensor of experts, in the place of ``values`` (experts, rows,
    columns): a matrix in MXFP4 is drawn as such, so that nothing is rounded."""
    experts, rows, columns = values.shape
    blocks = (experts, rows, columns // mxfp4.BLOCK)
    halves = raw_bytes(f"{label} {name} blocks", int(np.prod(blocks)) * mxfp4.BLOCK // 2)
    shifts = raw_bytes(f"{label} {name} scales", int(np.prod(blocks))) & 3
    return {
        f"{name}_blocks": halves.reshape(*blocks, mxfp4.BLOCK // 2),
        f"{name}_scales": (UNIT_SCALE - 5 + shifts).astype(np.uint8).reshape(blocks),
    }
