"""A model of the kit as a Hugging Face checkpoint: config.json and model.safetensors."""

import json
from functools import partial
from pathlib import Path

import numpy as np

from flashinfer.formats import fp8, mxfp4
from flashinfer.formats.architectures import architecture, model_config
from flashinfer.formats.arrays import AnyArray
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.bundle.layout import layout
from flashinfer.oracle.kits.configs import KitModel
from flashinfer.oracle.kits.draws import power_of_two, raw_bytes, uniform
from flashinfer.oracle.kits.safetensors_file import safetensors_bytes
from flashinfer.oracle.kits.weights import Tensors, checkpoint_tensors, drawn, hugging_face_form

UNIT_SCALE = 127  # the byte of an MXFP4 scale of 1


def write_hugging_face(model: KitModel, folder: Path) -> None:
    """Write config.json and model.safetensors of ``model`` to a directory."""
    fields = model.hugging_face_config()
    module, config = architecture(fields), model_config(fields)
    form = hugging_face_form(model, config, module)
    less_one = getattr(module, "NORM_LESS_ONE", False)
    # The norm of what heads read is stored as it is, though its name there ends as others do.
    gated = module.NAMES.get("layers.{}.gated.weight", "no such").rpartition("{}")[2]
    stored: Tensors = {}
    draw = partial(drawn, config, model.name)
    for name, values in checkpoint_tensors(config, form, draw, layout(config)).items():
        if name.endswith("_mxfp4"):
            stored |= _mxfp4(name.removesuffix("_mxfp4"), values, model.name)
            continue
        if model.packing == "fp8" and name.endswith("_proj.weight"):
            stored |= _fp8(name, values, fields, model.name)
            continue
        if less_one and name.endswith("norm.weight") and not name.endswith(gated):
            values = values - np.float32(1)
        stored[name] = values
    eight_bits = {name for name in stored if f"{name}{fp8.SCALE}" in stored}
    text = json.dumps(fields, indent=2) + "\n"
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_bytes(
        safetensors_bytes(stored, {"format": "pt"}, eight_bits)
    )


def _fp8(name: str, values: AnyArray, fields: JsonObject, label: str) -> Tensors:
    """A random matrix in FP8 and the scales of its blocks, in the place of ``values``, for the same
    reason."""
    rows, columns = fp8.block_shape(fields)
    bits = raw_bytes(f"{label} {name} fp8", values.size).reshape(values.shape)
    # A sign, one of four exponents and any mantissa: from 1/16 to 15/16.
    quants = (bits & 0x80) | ((3 + (bits >> 3 & 3)) << 3) | (bits & 7)
    scales = uniform(f"{label} {name} scales", (len(values) // rows, values.shape[1] // columns))
    about = np.float32(power_of_two((3 / values.shape[1]) ** 0.5))
    return {
        name: quants.astype(np.uint8),
        f"{name}{fp8.SCALE}": about * (np.float32(1) + scales / np.float32(4)),
    }


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
