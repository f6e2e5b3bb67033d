"""Predictors that others trained, in PowerInfer's form (Song et al. 2023).

They come as a directory with one ``model_N.pt`` per layer, which holds fc1.weight (rank, d_model)
and fc2.weight (d_ffn, rank), with a ReLU between them; or in a GGUF file of PowerInfer's, beside
the model. They read the residual stream before the FFN's norm. A neuron counts as active where its
score is above the ``sparse_threshold`` of the model's config, or of the GGUF file.
"""

from pathlib import Path

import numpy as np

from flashinfer.calibration.predictor_training import Found
from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.errors import FormatError, reason
from flashinfer.formats.numbers import LARGEST_FLOAT32, is_number
from flashinfer.formats.sources.gguf import GgufFile, is_gguf
from flashinfer.formats.sources.shards import load_torch


def imported(source: Path | str, layer: int, d_model: int, d_ffn: int, threshold: float) -> Found:
    """The Found of one layer, whose shares are still to be measured.

    threshold  the config's; a GGUF file has its own
    Raises FormatError, and UserError where PyTorch is needed and not installed.
    """
    if is_gguf(source):
        path = Path(source)
        a, b, threshold = _from_gguf(path, layer)
    else:
        path = Path(source) / f"model_{layer}.pt"
        a, b = _from_torch(path)
    if a.ndim != 2 or not len(a) or a.shape[1] != d_model or b.shape != (d_ffn, a.shape[0]):
        raise FormatError(
            f"{path}: fc1 is {a.shape} and fc2 {b.shape}; the model has hidden size {d_model} and "
            f"{d_ffn} neurons"
        )
    bias = np.full(d_ffn, -threshold, dtype=np.float32)
    return Found(a, b, bias, 0.0, 0.0, 0.0, between="relu")


def _from_gguf(path: Path, layer: int) -> tuple[Float32Array, Float32Array, float]:
    """(fc1, fc2, the threshold) of a layer."""
    names = [f"blk.{layer}.fc{i}.weight" for i in (1, 2)]
    with GgufFile(path) as file:
        for name in names:
            if name not in file.tensors:
                raise FormatError(f"{path}: tensor {name} is missing; it has no such predictor")
            if len(file.tensors[name].shape) != 2:
                raise FormatError(f"{path}: tensor {name} is not a matrix")
        a, b = (file.decode(file.tensors[name].type, file.raw_rows(name)) for name in names)
        threshold = file.metadata.get("powerinfer.sparse_threshold", 0.0)
    if not is_number(threshold, -LARGEST_FLOAT32, LARGEST_FLOAT32):
        raise FormatError(f"{path}: powerinfer.sparse_threshold is not a number")
    return a, b, threshold


def _from_torch(path: Path) -> tuple[Float32Array, Float32Array]:
    """(fc1, fc2) of a layer."""
    if not path.exists():
        raise FormatError(f"{path}: does not exist; a predictor for each layer is needed")
    tensors = load_torch(path)
    try:
        fc1, fc2 = (tensors[f"fc{i}.weight"].float().numpy() for i in (1, 2))
        return fc1, fc2
    except (KeyError, TypeError, RuntimeError) as error:  # missing, or not of plain floats
        raise FormatError(f"{path}: is not a predictor: {reason(error)}") from None
