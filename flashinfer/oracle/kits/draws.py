"""Random numbers that are the same on every machine and with every NumPy.

They are the bytes of SHAKE-128 (FIPS 202), an extendable-output function, of a label: whole
numbers, which become floats without rounding. NumPy's own distributions may change with a version.
"""

import hashlib
import math

import numpy as np

from flashinfer.formats.arrays import Float32Array, Int64Array, UInt8Array

VERSION = 1  # of the kit; grows whenever one of its bytes changes
SEED = 0


def raw_bytes(label: str, n: int) -> UInt8Array:
    """(n,) uint8: the first n bytes of SHAKE-128 of the kit's version, its seed and ``label``."""
    text = f"flashinfer kit {VERSION}, seed {SEED}: {label}"
    return np.frombuffer(hashlib.shake_128(text.encode()).digest(n), dtype=np.uint8)


def uniform(label: str, shape: tuple[int, ...], scale: float = 1.0) -> Float32Array:
    """Random odd multiples of scale / 2048 between -scale and scale, float32.

    Of a ``scale`` that is a power of two from 2^-13 on, float16 holds every one of them exactly.
    """
    words = raw_bytes(label, 2 * math.prod(shape)).view("<u2")
    odd = 2 * (words >> 5).astype(np.int32) - 2047
    return (odd.astype(np.float32) * np.float32(scale / 2048)).reshape(shape)


def whole_numbers(label: str, n: int, least: int, most: int) -> Int64Array:
    """(n,) random whole numbers from ``least`` to ``most``, int64."""
    words = raw_bytes(label, 4 * n).view("<u4").astype(np.int64)
    return least + (words * (most + 1 - least) >> 32)


def power_of_two(value: float) -> float:
    """The power of two that is nearest to ``value`` > 0, by their ratio."""
    _, exponent = math.frexp(value)  # value is between 2^(exponent - 1) and 2^exponent
    return 2.0**exponent if value * value >= 2.0 ** (2 * exponent - 1) else 2.0 ** (exponent - 1)
