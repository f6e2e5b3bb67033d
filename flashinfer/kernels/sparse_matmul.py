"""Products with rows of weights in the file's number format, norms and activations."""

from dataclasses import dataclass

import numpy as np

from flashinfer.formats.arrays import (
    Float32Array,
    Int8Array,
    Int32Array,
    Int64Array,
    UInt8Array,
)
from flashinfer.formats.number_formats import BlockFormat, NumberFormat
from flashinfer.kernels import doors
from flashinfer.kernels.activations import ACTIVATIONS
from flashinfer.kernels.doors import checked

BLOCK_ROWS = 64  # rows of weights decoded to float32 at a time
BLOCK = 32  # activations that share a scale, where the weights are in blocks
LEAST = np.float32(1e-5)  # the largest magnitude that a token of smaller ones is rounded by


@dataclass(frozen=True)
class Matrix:
    """Weights in the file's number format: ``data`` (rows, row_bytes) uint8."""

    data: UInt8Array
    columns: int
    format: NumberFormat


@checked(doors.linear)
def linear(
    x: Float32Array, weight: Matrix, bias: Float32Array | None = None, rounded: bool = False
) -> Float32Array:
    """x (T, d), weight (n, d), bias (n,) -> (T, n).

    rounded  what is multiplied is ``round_tokens(x)`` (BitNet b1.58); otherwise weights in blocks
             are multiplied with ``quantise(x)``, in GGML's manner
    """
    out = np.empty((x.shape[0], weight.data.shape[0]), dtype=np.float32)
    for start in range(0, out.shape[1], BLOCK_ROWS):
        raw = weight.data[start : start + BLOCK_ROWS]
        out[:, start : start + BLOCK_ROWS] = _dots(x, raw, weight.format, rounded)
    if bias is not None:
        out += bias
    return out


@checked(doors.sparse_up)
def sparse_up(
    memory: UInt8Array,
    rows: Int64Array,
    format: NumberFormat,
    x: Float32Array,
    bias: Float32Array | None = None,
    indptr: Int32Array | None = None,
    tokens: Int32Array | None = None,
    rounded: bool = False,
) -> Float32Array:
    """Row i of weights . x[t] + bias[i], for rows that lie anywhere in memory (paper 3.3).

    memory  (nbytes,)
    rows    (n,): the offset in ``memory`` where each row begins
    x       (T, d); bias (n,)
    rounded  as in ``linear``
    Returns (n, T). With ``indptr`` (n + 1,) and ``tokens`` (nnz,), row i is multiplied with the
    tokens ``tokens[indptr[i]:indptr[i + 1]]`` only, and (nnz,) is returned.
    """
    if indptr is not None and tokens is not None:
        return _some_pairs(memory, rows, format, x, bias, indptr, tokens, rounded)
    out = np.empty((len(rows), x.shape[0]), dtype=np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        raw = _gather(memory, rows[start : start + BLOCK_ROWS], format, x.shape[1])
        out[start : start + BLOCK_ROWS] = _dots(x, raw, format, rounded).T
    return out if bias is None else out + bias[:, None]


def _some_pairs(
    memory: UInt8Array,
    rows: Int64Array,
    format: NumberFormat,
    x: Float32Array,
    bias: Float32Array | None,
    indptr: Int32Array,
    tokens: Int32Array,
    rounded: bool,
) -> Float32Array:
    """``sparse_up`` of the tokens of each row: some rows at a time meet the tokens that any of them
    has."""
    out = np.empty(len(tokens), dtype=np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        raw = _gather(memory, rows[start : start + BLOCK_ROWS], format, x.shape[1])
        ends = indptr[start : start + BLOCK_ROWS + 1]
        begin, end = int(ends[0]), int(ends[-1])
        used, at = np.unique(tokens[begin:end], return_inverse=True)
        row = _row_of_pair(ends)
        out[begin:end] = _dots(x[used], raw, format, rounded).T[row, at]
        if bias is not None:
            out[begin:end] += bias[start + row]
    return out


@checked(doors.sparse_down)
def sparse_down(
    memory: UInt8Array,
    rows: Int64Array,
    format: NumberFormat,
    a: Float32Array,
    y: Float32Array,
    indptr: Int32Array | None = None,
    tokens: Int32Array | None = None,
) -> None:
    """y[t] += a[i, t] * row i for i ascending, in place.

    a  as ``sparse_up`` returns it; y (T, d); the others as in ``sparse_up``
    One row is added after another, so that the split of rows among calls does not change a bit.
    """
    if indptr is not None:
        dense = np.zeros((len(rows), y.shape[0]), dtype=np.float32)
        dense[_row_of_pair(indptr), tokens] = a
        a = dense
    for start in range(0, len(rows), BLOCK_ROWS):
        raw = _gather(memory, rows[start : start + BLOCK_ROWS], format, y.shape[1])
        weights = format.decode(raw)
        for row, factors in zip(weights, a[start : start + BLOCK_ROWS], strict=True):
            used = np.flatnonzero(factors)
            if used.size:
                y[used] += factors[used, None] * row


@checked(doors.activate)
def activate(x: Float32Array, kind: str, threshold: float = 0.0) -> None:
    """Apply the activation ``kind``, one of activations.ACTIVATIONS, to x, of any shape, in place.

    relu keeps values above ``threshold`` and zeroes the others (FATReLU); relu2 squares what relu
    keeps; "cap" is threshold tanh(x / threshold).
    """
    x[...] = ACTIVATIONS[kind](x, np.float32(threshold))


@checked(doors.layer_norm)
def layer_norm(
    x: Float32Array, weight: Float32Array | None, bias: Float32Array | None, epsilon: float
) -> Float32Array:
    """x (T, d) -> (x - mean) / sqrt(variance + epsilon), times weight (d,), plus bias (d,).

    weight and bias are both None where the norm has none. Each token's sums are separate, so that T
    does not change a bit.
    """
    centred = x - _mean(x)
    variance = _mean(np.square(centred))
    y = centred / np.sqrt(variance + np.float32(epsilon))
    return y if weight is None or bias is None else y * weight + bias


@checked(doors.rms_norm)
def rms_norm(x: Float32Array, weight: Float32Array | None, epsilon: float) -> Float32Array:
    """x (T, d) -> x / sqrt(mean of squares + epsilon), times weight (d,) where it is given."""
    y = x / np.sqrt(_mean(np.square(x)) + np.float32(epsilon))
    return y if weight is None else y * weight


def quantise(x: Float32Array) -> tuple[Float32Array, Int8Array]:
    """Activations of 8 bits: x (T, d) -> scales (T, blocks, 1), q (T, blocks, 32).

    x is approximately q * scales. In each block of 32 the largest magnitude becomes 127 or -127.
    """
    blocks = x.reshape(len(x), x.shape[1] // BLOCK, BLOCK)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    q = np.fmin(np.fmax(np.rint(blocks * inverse), -127), 127)  # a NaN becomes -127
    return largest / np.float32(127), q.astype(np.int8)


def round_tokens(x: Float32Array) -> tuple[Float32Array, Int8Array]:
    """Activations of 8 bits whose tokens have one scale each: x (T, d) -> scales (T, 1), q (T, d).

    x is approximately q * scales. A token's largest magnitude, or LEAST, becomes 127.
    """
    scales, q = whole_numbers(x, np.abs(x).max(axis=1, keepdims=True, initial=0))
    return scales, q.astype(np.int8)


def whole_numbers(x: Float32Array, largest: Float32Array) -> tuple[Float32Array, Float32Array]:
    """x, of any shape, and the largest magnitudes, which broadcast with it -> scales, shaped as
    these, and q, shaped as x: whole numbers from -127 to 127, and -127 for a NaN.

    x is approximately q * scales. The largest magnitude, or LEAST, becomes 127.
    """
    largest = np.maximum(largest, LEAST)
    q = x * (np.float32(127) / largest)
    np.rint(q, out=q)
    np.fmax(q, -127, out=q)  # not ``maximum``, which a NaN passes
    return largest / np.float32(127), np.fmin(q, 127, out=q)


def _dots(
    x: Float32Array, raw: UInt8Array, format: NumberFormat, rounded: bool = False
) -> Float32Array:
    """x (T, d) . rows raw (n, row_bytes) -> (T, n).

    einsum sums each dot product in an order that T and n do not change; a BLAS product would not.
    """
    if not isinstance(format, BlockFormat):
        if rounded:
            token_scales, whole_x = round_tokens(x)
            x = whole_x * token_scales
        return np.einsum("td,nd->tn", x, format.decode(raw), optimize=False)
    scales, quants, minima = format.groups(raw)  # (n, groups), (n, groups, group), (n, groups)
    out = np.empty((len(x), len(raw)), dtype=np.float32)
    for t, (of_blocks, q) in enumerate(zip(*_in_blocks(x, rounded), strict=True)):
        x_scales = np.repeat(of_blocks[:, 0], BLOCK // format.group)  # (groups,)
        q = q.reshape(-1, format.group)  # (groups, group)
        whole = np.einsum("ngk,gk->ng", quants, q, dtype=np.int32)  # exact
        out[t] = (whole * (scales * x_scales)).sum(axis=1, dtype=np.float32)
        if minima is not None:
            sums = q.sum(axis=1, dtype=np.int32) * x_scales
            out[t] -= (minima * sums).sum(axis=1, dtype=np.float32)
    return out


def _in_blocks(x: Float32Array, rounded: bool) -> tuple[Float32Array, Int8Array]:
    """What ``quantise`` gives of x, or ``round_tokens`` in the same form."""
    if not rounded:
        return quantise(x)
    scales, q = round_tokens(x)
    blocks = x.shape[1] // BLOCK
    return np.repeat(scales, blocks, axis=1)[..., None], q.reshape(len(x), blocks, BLOCK)


def _mean(x: Float32Array) -> Float32Array:
    """The mean of each row, (T, 1). Unlike np.mean it does not warn where T is 0."""
    return x.sum(axis=1, keepdims=True) / np.float32(x.shape[1])


def _gather(memory: UInt8Array, rows: Int64Array, format: NumberFormat, columns: int) -> UInt8Array:
    """The bytes (n, row_bytes) of the rows that begin at these offsets of memory."""
    return memory[rows[:, None] + np.arange(format.row_bytes(columns))]


def _row_of_pair(indptr: Int32Array) -> Int64Array:
    """The row of each pair (row, token) in CSR form."""
    return np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
