"""Elementary functions from additions and multiplications alone, with the same bits everywhere.

The last bits of NumPy's and the C library's functions differ from machine to machine. Values that
reach a logit, or a choice between tokens, are therefore computed by these functions.
"""

from decimal import Context, Decimal

import numpy as np

from flashinfer.formats.arrays import Float64Array

# Decimal arithmetic is exact to 40 digits; a float64 holds 16 of them.
DIGITS = Context(prec=40, Emin=-999_999, Emax=999_999, traps=[])
# pi / 2 as a sum of four pieces. All but the last have 26 bits, so that their multiples are exact.
HALF_PI = (
    float.fromhex("0x1.921fb5p+0"),
    float.fromhex("0x1.110b46p-26"),
    float.fromhex("0x1.1a6263p-54"),
    float.fromhex("0x1.8a2e03707344ap-81"),
)
FARTHEST = 2.0**26  # smaller angles are reduced by these pieces, larger ones by fmod
# Taylor series; within pi / 4 the first term left out is below 2^-60.
SIN = (-1 / 6, 1 / 120, -1 / 5040, 1 / 362880, -1 / 39916800, 1 / 6227020800, -1 / 1307674368000)
COS = (
    -1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800, 1 / 479001600, -1 / 87178291200,
    1 / 20922789888000,
)  # fmt: skip
LN2 = (float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33"))


def power(base: float, exponent: float) -> float:
    """base ** exponent for base > 0, rounded to the nearest float; 0 or inf beyond its range."""
    return float(DIGITS.power(Decimal(float(base)), Decimal(float(exponent))))


def log(value: float) -> float:
    """The natural logarithm of ``value`` > 0, rounded to the nearest float."""
    return float(DIGITS.ln(Decimal(float(value))))


def cos_sin(angles: Float64Array) -> tuple[Float64Array, Float64Array]:
    """The cosines and sines of finite angles, of any shape.

    The error is below 2^-50 for angles below FARTHEST. Larger angles are reduced with float64's
    2 pi, whose error then counts.
    """
    near = np.where(np.abs(angles) < FARTHEST, angles, np.fmod(angles, 2 * np.pi))
    turns = np.rint(near * (2 / np.pi))
    r = near
    for piece in HALF_PI:
        r = r - turns * piece
    square = r * r
    sine, cosine = r + r * square * _series(SIN, square), 1 + square * _series(COS, square)
    quarter = turns.astype(np.int64) & 3
    swapped = (quarter & 1).astype(bool)
    cosines = np.where(swapped, sine, cosine)
    sines = np.where(swapped, cosine, sine)
    return (
        np.where((quarter == 1) | (quarter == 2), -cosines, cosines),
        np.where(quarter >= 2, -sines, sines),
    )


def exp(x: Float64Array) -> Float64Array:
    """e^x for x <= 0, within some units in the last place; 0 below -700."""
    within = np.maximum(x, -700.0)
    k = np.rint(within * (1 / LN2[0]))
    r = (within - k * LN2[0]) - k * LN2[1]
    terms = np.ones_like(r)
    for n in range(18, 0, -1):  # the Taylor series, by Horner's rule
        terms = 1 + terms * r / n
    return np.where(x < -700.0, 0.0, np.ldexp(terms, k.astype(np.int32)))


def softplus(x: Float64Array) -> Float64Array:
    """log(1 + e^x), within some units in the last place."""
    # log(1 + y) = 2 artanh(s), s = y / (2 + y), which is at most 1 / 3 for y up to 1.
    y = exp(-np.abs(x))
    s = y / (2 + y)
    terms = np.zeros_like(s)
    for n in range(39, 0, -2):
        terms = 1 / n + terms * s * s
    return np.maximum(x, 0) + 2 * s * terms


def _series(terms: tuple[float, ...], x: Float64Array) -> Float64Array:
    """terms[0] + terms[1] x + ..., by Horner's rule."""
    total = np.full_like(x, terms[-1])
    for term in terms[-2::-1]:
        total = total * x + term
    return total
