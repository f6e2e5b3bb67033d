"""Predictors that others trained, in PowerInfer's form (Song et al. 2023).

A directory with one ``model_N.pt`` a layer: fc1.weight (rank, d_model) and fc2.weight (d_ffn,
rank), a ReLU between them. They read the residual stream before the FFN's norm, and a neuron counts
as active where its score is above the config's ``sparse_threshold``.
"""

from pathlib import Path

import numpy as np

from flashinfer.formats.errors import FormatError, UserError
from flashinfer.predictor_training import Found


def imported(folder, layer, d_model, d_ffn, threshold):
    """The Found of one layer, its shares not measured yet. Raises FormatError, UserError."""
    path = Path(folder) / f"model_{layer}.pt"
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading it needs PyTorch: pip install torch") from None
    if not path.exists():
        raise FormatError(f"{path}: does not exist; a predictor for each layer is needed")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        a, b = (tensors[f"fc{i}.weight"].float().numpy() for i in (1, 2))
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise FormatError(f"{path}: is not a predictor: {reason}") from None
    if a.ndim != 2 or a.shape[1] != d_model or b.shape != (d_ffn, a.shape[0]):
        raise FormatError(
            f"{path}: fc1 is {a.shape} and fc2 {b.shape}; the model has hidden size {d_model} and "
            f"{d_ffn} neurons"
        )
    bias = np.full(d_ffn, -threshold, dtype=np.float32)
    return Found(a, b, bias, 0.0, 0.0, 0.0, between="relu")
