"""Digests of a run: of each layer's output, and of the logits."""

import hashlib
from collections.abc import Sequence

import numpy as np

from flashinfer.formats.arrays import AnyArray
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.model import Model
from flashinfer.oracle.trace import Recorder, wanted_values
from flashinfer.oracle.trace_file import DIGEST
from flashinfer.transformer.values import Value

KEYS = ("output", "logits")


class Hashes:
    """A Sink that hashes values whose rows come in order."""

    def __init__(self, values: Sequence[Value]) -> None:
        self.hashes = {value.name: hashlib.sha256() for value in values}

    def rows(self, value: Value, first: int, rows: AnyArray) -> None:
        """Take the next rows (n, ...) of a value."""
        self.hashes[value.name].update(np.ascontiguousarray(rows).tobytes())


def digest(
    model: Model, token_ids: Sequence[int], progress: Progress = no_progress
) -> dict[str, str]:
    """{name of a value: the first digits of the SHA-256 of its float32, little-endian}, of every
    layer's output and of the logits of ``token_ids``, from an empty context.

    The compiled kernels give the same on every machine; the NumPy kernels' sums depend on the
    NumPy that is installed. Raises UserError as ``Model.forward``.
    """
    model.reset()
    ids = model.checked(token_ids)
    values = [value for value in wanted_values(model) if value.key in KEYS]
    hashes = Hashes(values)
    model.trace(ids, Recorder(values, np.arange(len(ids)), hashes), progress)
    return {name: found.hexdigest()[:DIGEST] for name, found in hashes.hashes.items()}
