"""Products with rows of weights in the file's number format, norms and activations."""

from dataclasses import dataclass

import numpy as np

from flashinfer.formats.number_formats import BlockFormat, NumberFormat
from flashinfer.kernels import doors
from flashinfer.kernels.activations import ACTIVATIONS
from flashinfer.kernels.doors import checked

BLOCK_ROWS = 64  # rows of weights decoded to float32 at a time


@dataclass(frozen=True)
class Matrix:
    """Weights in the file's number format: ``data`` (rows, row_bytes) uint8."""

    data: np.ndarray
    columns: int
    format: NumberFormat


@checked(doors.linear)
def linear(x, weight, bias=None):
    """x (T, d) float32, weight Matrix (n, d), bias (n,) -> (T, n) float32.

    Weights in blocks of 4 or 8 bits are multiplied with ``quantise(x)``, as in GGML.
    """
    out = np.empty((x.shape[0], weight.data.shape[0]), dtype=np.float32)
    for start in range(0, out.shape[1], BLOCK_ROWS):
        raw = weight.data[start : start + BLOCK_ROWS]
        out[:, start : start + BLOCK_ROWS] = _dots(x, raw, weight.format)
    if bias is not None:
        out += bias
    return out


@checked(doors.sparse_up)
def sparse_up(memory, rows, format, x, bias=None, indptr=None, tokens=None):
    """Row i of weights . x[t] + bias[i], for rows that lie anywhere in memory (paper 3.3).

    memory  uint8, flat; rows (n,) int64: the byte where each row begins
    x       (T, d) float32; bias (n,) float32
    Returns (n, T) float32. With ``indptr`` (n + 1,) and ``tokens`` (nnz,) int32, row i is
    multiplied with the tokens ``tokens[indptr[i]:indptr[i + 1]]`` only; returns (nnz,).
    """
    out = np.empty((len(rows), x.shape[0]), dtype=np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        raw = _gather(memory, rows[start : start + BLOCK_ROWS], format, x.shape[1])
        out[start : start + BLOCK_ROWS] = _dots(x, raw, format).T
    if bias is not None:
        out += bias[:, None]
    if indptr is None:
        return out
    return out[_row_of_pair(indptr), tokens]


@checked(doors.sparse_down)
def sparse_down(memory, rows, format, a, y, indptr=None, tokens=None):
    """y[t] += a[i, t] * row i for i ascending, in place; a as ``sparse_up`` returns it.

    y (T, d) float32. One row is added after another, so how the rows are split among calls
    does not change a bit.
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
def activate(x, kind, threshold=0.0):
    """The activation named ``kind`` (activations.py) of x, float32 of any shape, in place.

    relu keeps what is above ``threshold`` (FATReLU), relu2 squares it; "cap" is
    threshold tanh(x / threshold).
    """
    x[...] = ACTIVATIONS[kind](x, np.float32(threshold))


@checked(doors.layer_norm)
def layer_norm(x, weight, bias, epsilon):
    """x (T, d) float32 -> (x - mean) / sqrt(variance + epsilon), times weight, plus bias (d,).

    weight and bias are both None where the norm has none. Token by token: T changes no bit.
    """
    centred = x - _mean(x)
    variance = _mean(np.square(centred))
    y = centred / np.sqrt(variance + np.float32(epsilon))
    return y if weight is None else y * weight + bias


@checked(doors.rms_norm)
def rms_norm(x, weight, epsilon):
    """x (T, d) float32 -> x / sqrt(mean of squares + epsilon), times weight (d,) or None."""
    y = x / np.sqrt(_mean(np.square(x)) + np.float32(epsilon))
    return y if weight is None else y * weight


def quantise(x):
    """Activations of 8 bits: x (T, d) -> scales (T, blocks, 1) float32, q (T, blocks, 32) int8.

    x is about q * scale; in each block of 32 the largest becomes 127 or -127.
    """
    blocks = x.reshape(len(x), x.shape[1] // 32, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    q = np.fmin(np.fmax(np.rint(blocks * inverse), -127), 127)  # a NaN becomes -127
    return largest / np.float32(127), q.astype(np.int8)


def _dots(x, raw, format):
    """x (T, d), rows raw (n, row_bytes) -> (T, n). einsum adds each dot product in an order of
    its own, the same for any T and n; a BLAS product would not."""
    if not isinstance(format, BlockFormat):
        return np.einsum("td,nd->tn", x, format.decode(raw), optimize=False)
    scales, quants = format.quants(raw)  # (n, blocks, 1), (n, blocks, 32)
    out = np.empty((len(x), len(raw)), dtype=np.float32)
    for t, (x_scales, q) in enumerate(zip(*quantise(x), strict=True)):
        whole = np.einsum("nbk,bk->nb", quants, q, dtype=np.int32)  # exact
        out[t] = (whole * (scales * x_scales)[..., 0]).sum(axis=1, dtype=np.float32)
    return out


def _mean(x):
    """Of each row (T, 1); of none nothing, without a word."""
    return x.sum(axis=1, keepdims=True) / np.float32(x.shape[1])


def _gather(memory, rows, format, columns):
    """The bytes of the rows that begin at these bytes of memory (n, row_bytes)."""
    return memory[rows[:, None] + np.arange(format.row_bytes(columns))]


def _row_of_pair(indptr):
    return np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
