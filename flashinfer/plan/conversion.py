"""What it takes to convert a model that is not here as a bundle yet."""

import time
from dataclasses import dataclass

import numpy as np

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.number_formats import FORMATS
from flashinfer.plan.profile import Profile, bytes_by_format

SAMPLE = (64, 4096)  # values that are encoded to see how long it takes


@dataclass(frozen=True)
class Conversion:
    """Reads, writes, and the time that they and encoding take at least.

    reads           bytes of the source; assumed: they are not known, and taken as 16 bits a weight
    writes          bytes of the bundle
    flash_seconds   of both, where the device writes as fast as it reads
    encode_seconds  of values that are encoded anew, on this machine
    in_place        the GGUF file can be run where it lies instead
    """

    reads: int
    assumed: bool
    writes: int
    flash_seconds: float
    encode_seconds: float
    in_place: bool

    @property
    def least_seconds(self) -> float:
        """Of all of it: ``convert`` reads, encodes and writes in turn."""
        return self.flash_seconds + self.encode_seconds


def conversion_of(bundle: Bundle, source: int, kept: bool, profile: Profile) -> Conversion:
    """The Conversion to a bundle, of which the outline is here.

    source  the bytes of GGUF files, or 0: of another model, whose size is not known
    kept    the GGUF files' weights are not encoded anew
    """
    values: dict[str, int] = {}
    for tensor in bundle.tensors.values():
        for name, nbytes in bytes_by_format(tensor).items():
            format = FORMATS[name]
            values[name] = values.get(name, 0) + nbytes // format.block_bytes * format.block
    reads, writes = source or 2 * sum(values.values()), bundle.nbytes
    return Conversion(
        reads, not source, writes,
        flash_seconds=(reads + writes) / max(profile.streams.values()),
        encode_seconds=0.0 if kept else encode_seconds(values),
        in_place=kept and any(layer.ffn.matrices for layer in bundle.config.layers),
    )  # fmt: skip


def encode_seconds(values: dict[str, int]) -> float:
    """How long this machine takes to encode {number format: so many values}, by samples."""
    sample = np.random.default_rng(0).standard_normal(SAMPLE).astype(np.float32)
    found = 0.0
    for name, count in values.items():
        if count >= sample.size:
            began = time.perf_counter()
            FORMATS[name].encode(sample)
            found += (time.perf_counter() - began) * count / sample.size
    return found
