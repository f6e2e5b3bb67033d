"""Encoded rows of each number format, what they decode to, and their products with a vector.

A file has
    rows        (n, row_bytes) uint8; of MXFP4 blocks (n, b, 16) and scales (n, b) uint8
    values      (n, columns) float32: what they decode to, to the last bit
    vector      (columns,) float32
    products    (n,) float64: the exact product of each row of values with the vector, rounded once
    magnitudes  (n,) float64: the same of all absolute values, by which an error is measured
and, of the formats whose encoder GGML's package gives bit for bit,
    source      (m, columns) float32
    encoded     (m, row_bytes) uint8: what ``source`` is encoded to
"""

import math

import numpy as np

from flashinfer.formats import mxfp4
from flashinfer.formats.arrays import AnyArray, Float32Array, Float64Array, UInt8Array
from flashinfer.formats.number_formats import FORMATS, BlockFormat, NumberFormat
from flashinfer.oracle.kits.draws import raw_bytes, uniform

COLUMNS = 64
# {number format: where its blocks have their one or two float16}
HALVES = {
    "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q2_K": (80, 82), "q3_K": (108,), "q4_K": (0, 2),
    "q5_K": (0, 2), "q6_K": (208,), "iq4_nl": (0,), "iq4_xs": (0,), "tq1_0": (52,), "tq2_0": (64,),
}  # fmt: skip
NAMES = ("f16", "bf16", "q8_0", "q4_0", "mxfp4", *HALVES)
ENCODED = ("f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "tq1_0", "tq2_0")
# float16 scales of blocks: zero of either sign, the least and the largest subnormal, the least
# normal, 1, the largest, and a negative one.
SCALES = (0x0000, 0x8000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0xB555)
# 2^(byte - 127) of MXFP4: above 252 the largest value, 6, times the scale would be infinite.
MOST_SCALE = 252


def tensors_of(name: str) -> dict[str, AnyArray]:
    """{name: array} of the file of a number format."""
    found: dict[str, AnyArray]
    if name == "mxfp4":
        blocks, scales = _mxfp4_rows()
        found, values = {"blocks": blocks, "scales": scales}, mxfp4.decode(blocks, scales)
    else:
        format = FORMATS[name]
        found = {"rows": _rows(name, format)}
        values = format.decode(found["rows"])
        if name in ENCODED:
            found["source"] = source = _sources(format)
            found["encoded"] = format.encode(source)
    vector = uniform("number formats, vector", (values.shape[1],))
    products, magnitudes = exact_products(values, vector)
    return {
        **found, "values": values, "vector": vector, "products": products,
        "magnitudes": magnitudes,
    }  # fmt: skip


def exact_products(values: Float32Array, vector: Float32Array) -> tuple[Float64Array, Float64Array]:
    """(products, magnitudes) of values (n, columns) and vector (columns,), each (n,).

    A product of two float32 is exact in float64, and fsum adds them without rounding.
    """
    terms = values.astype(np.float64) * vector.astype(np.float64)
    products = [math.fsum(row) for row in terms]
    return np.array(products), np.array([math.fsum(row) for row in np.abs(terms)])


def _rows(name: str, format: NumberFormat) -> UInt8Array:
    """Rows (n, row_bytes) of every number, or of random ones, with SCALES."""
    if name in HALVES:
        return _random_rows(name, format)
    return _block_rows(name, format) if isinstance(format, BlockFormat) else _every_16_bits(name)


def _random_rows(name: str, format: NumberFormat) -> UInt8Array:
    """Rows of two blocks of random bytes (n, row_bytes) with SCALES in the places of their float16,
    of two each with each."""
    size, places = format.block_bytes, HALVES[name]
    n = 2 * len(SCALES) ** len(places)
    blocks = raw_bytes(f"number formats, {name}", n * size).reshape(n, size).copy()
    for number, at in enumerate(places):
        each = np.arange(n) // len(SCALES) ** number % len(SCALES)
        blocks[:, at : at + 2] = np.array(SCALES, dtype="<u2")[each, None].view(np.uint8)
    return blocks.reshape(n // 2, 2 * size)


def _every_16_bits(name: str) -> UInt8Array:
    """Every finite float16 or bfloat16 (n, 2 COLUMNS): both zeros, subnormals, the largest."""
    bits = np.arange(1 << 16, dtype="<u2")
    exponent = 0x7C00 if name == "f16" else 0x7F80
    finite = bits[bits & exponent != exponent].reshape(-1, COLUMNS)
    return finite.view(np.uint8)


def _block_rows(name: str, format: NumberFormat) -> UInt8Array:
    """Rows of blocks (n, row_bytes): each of SCALES with every byte of quants, which for 4 bits is
    every pair of them."""
    size = format.block_bytes - 2
    quants = np.arange(256, dtype=np.uint8).reshape(-1, size)  # (blocks, bytes of each)
    blocks = []
    for scale in SCALES:
        scales = np.full((len(quants), 1), scale, dtype="<u2").view(np.uint8)
        blocks.append(np.concatenate([scales, quants], axis=1))
    mixed = raw_bytes(f"number formats, {name}", 64 * size).reshape(64, size)
    few = np.array(SCALES, dtype="<u2")[np.arange(64) % len(SCALES)]
    blocks.append(np.concatenate([few.view(np.uint8).reshape(64, 2), mixed], axis=1))
    return np.concatenate(blocks).reshape(-1, format.row_bytes(COLUMNS))


def _mxfp4_rows() -> tuple[UInt8Array, UInt8Array]:
    """(blocks (n, b, 16), scales (n, b)): every scale with random values, and every pair of values
    with a scale of 1."""
    each = np.arange(MOST_SCALE + 1, dtype=np.uint8)  # an odd number of them
    scales = np.concatenate([each, each[-1:], np.full(16, 127, dtype=np.uint8)])
    halves = raw_bytes("number formats, mxfp4", 16 * (MOST_SCALE + 2))
    pairs = np.arange(256, dtype=np.uint8)
    return np.concatenate([halves, pairs]).reshape(-1, 2, 16), scales.reshape(-1, 2)


def _sources(format: NumberFormat) -> Float32Array:
    """Rows to encode (m, COLUMNS), or of one block each: of several magnitudes, zeros of either
    sign, halves between two numbers of some formats, and single values beside zeros."""
    rows = [uniform("number formats, source", (8, COLUMNS)) * np.float32(2.0**e)
            for e in (-12, -3, 0, 5)]  # fmt: skip
    zeros = np.zeros((2, COLUMNS), dtype=np.float32)
    zeros[1] = -0.0
    steps = np.arange(-COLUMNS // 2, COLUMNS // 2, dtype=np.float32)
    halves = np.stack([
        np.append(steps[1:] + np.float32(0.5), np.float32(127)),  # of q8_0, whose scale is 1
        np.where(steps % 32 == 0, -8, steps % 16 - np.float32(7.5)),  # of q4_0, whose scale is 1
        1 + (2 * steps + 1) * np.float32(2.0**-11),  # of f16
        1 + (2 * steps + 1) * np.float32(2.0**-8),  # of bf16
    ]).astype(np.float32)  # fmt: skip
    single = np.zeros((4, COLUMNS), dtype=np.float32)
    single[[0, 1, 2, 3], [0, 31, 32, 63]] = (1, -1, 127, -0.0078125)
    fine = uniform("number formats, fine", (8, COLUMNS)) + uniform(
        "number formats, finer", (8, COLUMNS), 2.0**-12
    )
    found = np.concatenate([*rows, zeros, halves, single, fine])
    if format.block <= COLUMNS:
        return found
    whole = found.size // format.block * format.block
    return found.reshape(-1)[:whole].reshape(-1, format.block)
