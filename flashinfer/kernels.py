"""Every hot path in plain NumPy, which explains and checks, and the choice of its compiled twin.

A compiled twin has the same name, arguments and meaning. Callers write ``kernels.linear(...)``
and get the compiled one where there is one. ``FLASHINFER_KERNELS=numpy`` in the environment, or
``use("numpy")``, picks these instead. The last bits of the two may differ; within one of them
they never do, however rows, tokens and threads are split: see the comment at each sum.
"""

import errno
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from flashinfer.formats.number_formats import BlockFormat, NumberFormat

BLOCK_ROWS = 64  # rows of weights decoded to float32 at a time


@dataclass(frozen=True)
class Matrix:
    """Weights in the file's number format: ``data`` (rows, row_bytes) uint8."""

    data: np.ndarray
    columns: int
    format: NumberFormat


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


def attention(q, keys, values, start, window=0, bias=None, cap=0.0, sinks=None):
    """Causal attention of tokens start.. over the key/value cache.

    q       (T, H, w) float32, scaled; keys, values (G, context, w) f32 or f16, filled up to
            start + T. Each of the G is shared by H / G neighbouring heads of q.
    window  tokens that each sees, itself included; 0: all
    cap     scores become cap tanh(score / cap); 0: not
    bias    (H, context) float32, added to the scores of each position, or None
    sinks   (H,) float32, a score of each head that no value stands behind, or None
    Returns (T, H, w) float32. Token by token, so that T does not change a bit.
    """
    tokens, heads, width = q.shape
    out = np.empty(q.shape, dtype=np.float32)
    groups = q.reshape(tokens, len(keys), heads // len(keys), width)
    for t in range(tokens):
        n = start + t + 1
        first = max(0, n - window) if window else 0
        scores = np.einsum("ghw,gpw->ghp", groups[t], keys[:, first:n].astype(np.float32))
        if cap:
            activate(scores, "cap", cap)
        if bias is not None:
            scores += bias[:, first:n].reshape(*scores.shape)
        largest = scores.max(axis=2, keepdims=True)
        if sinks is not None:
            sink = sinks.reshape(*largest.shape)
            largest = np.maximum(largest, sink)
        scores = np.exp(scores - largest)
        total = scores.sum(axis=2, keepdims=True)
        if sinks is not None:
            total += np.exp(sink - largest)
        weighted = np.einsum("ghp,gpw->ghw", scores, values[:, first:n].astype(np.float32))
        out[t] = (weighted / total).reshape(heads, width)
    return out


def remember(cache, x, start):
    """Keys or values x (T, G, w) float32 of the tokens start.. into their cache, f32 or f16.

    cache  (G, context, w or, padded, more)
    """
    cache[:, start : start + x.shape[0], : x.shape[2]] = x.transpose(1, 0, 2)


def rotate(x, cos, sin):
    """Turn pairs (i, i + m) of the first 2 m values of each head, in place (rotary positions).

    x (T, H, w) float32; cos, sin (T, m) float32.
    """
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    first, second = x[:, :, :half].copy(), x[:, :, half : 2 * half].copy()
    x[:, :, :half] = first * cos - second * sin
    x[:, :, half : 2 * half] = second * cos + first * sin


def activate(x, kind, threshold=0.0):
    """The activation named ``kind`` (config.ACTIVATIONS) of x, float32, in place.

    relu keeps what is above ``threshold`` (FATReLU), relu2 squares it; "cap" is
    threshold tanh(x / threshold).
    """
    if kind == "cap":
        x[...] = threshold * (2 * _sigmoid(x * np.float32(2 / threshold)) - 1)
    elif kind in ("relu", "relu2"):
        x[~(x > threshold)] = 0
        if kind == "relu2":
            x *= x
    elif kind == "quick_gelu":
        x *= _sigmoid(np.float32(1.702) * x)
    elif kind == "gelu":
        x *= np.float32(0.5) * (1 + _erf(x * np.float32(0.5**0.5)))
    elif kind == "gelu_tanh":
        x *= _sigmoid(np.float32(1.5957691216) * (x + np.float32(0.044715) * x * x * x))
    else:
        x *= _sigmoid(x)


def layer_norm(x, weight, bias, epsilon):
    """x (T, d) float32 -> (x - mean) / sqrt(variance + epsilon), times weight, plus bias (d,).

    weight and bias are both None where the norm has none. Token by token: T changes no bit.
    """
    centred = x - x.mean(axis=1, keepdims=True)
    variance = np.square(centred).mean(axis=1, keepdims=True)
    y = centred / np.sqrt(variance + np.float32(epsilon))
    return y if weight is None else y * weight + bias


def rms_norm(x, weight, epsilon):
    """x (T, d) float32 -> x / sqrt(mean of squares + epsilon), times weight (d,) or None."""
    y = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + np.float32(epsilon))
    return y if weight is None else y * weight


def positive(scores):
    """The neurons whose score is > 0: scores (d_ffn,) float32 -> (n,) int32 ascending."""
    return np.flatnonzero(scores > 0).astype(np.int32)


def place(neurons, token, window, slot_of, neuron_at, last_used, priority, used):
    """Give each of ``neurons`` a row of a layer's cache: the paper's section 3.3.

    neurons    (n,) int32 ascending; token: number of the current one; window: in tokens
    slot_of    (d_ffn,) int32: the row that holds each neuron, or -1
    neuron_at  (capacity,) int32: the neuron in each row, or -1
    last_used  (capacity,) int64: the token that used each row last
    priority   (d_ffn,) float64: where rows are short, the neurons with the least make room
    used       rows 0..used-1 hold neurons
    The arrays are changed in place. Returns (slots (n,), misses, moved_from, moved_to, used):
    the row of each neuron; the indices into ``neurons`` whose row must be read; the rows whose
    bytes must be copied, and where to; the new ``used``.
    Raises ValueError where n exceeds the capacity.
    """
    if len(neurons) > len(neuron_at):
        raise ValueError(f"{len(neurons)} neurons do not fit the cache's {len(neuron_at)} rows")
    slots = slot_of[neurons]
    misses = np.flatnonzero(slots < 0).astype(np.int32)
    last_used[slots[slots >= 0]] = token

    # Rows that the misses may take: those that left the window, then, where these and the unused
    # rows do not suffice, those of the least priority.
    kept = last_used[:used] > token - window
    free = np.flatnonzero(~kept).astype(np.int32)
    short = len(misses) - (len(neuron_at) - used) - len(free)
    if short > 0:
        kept[slots[slots >= 0]] = False
        candidates = np.flatnonzero(kept)
        least = np.argpartition(priority[neuron_at[candidates]], short - 1)[:short]
        free = np.sort(np.concatenate([free, candidates[least].astype(np.int32)]))
    slot_of[neuron_at[free]] = -1
    neuron_at[free] = -1

    # Append: first into the rows that became free, then behind the last one.
    taken = free[: len(misses)]
    rows = np.concatenate([taken, used + np.arange(len(misses) - len(taken), dtype=np.int32)])
    used += len(rows) - len(taken)
    slot_of[neurons[misses]] = rows
    neuron_at[rows] = neurons[misses]
    last_used[rows] = token

    # Delete: the last rows move into the rows that are still free, and the matrix shrinks.
    left = free[len(misses) :]
    used -= len(left)
    moved_to = left[left < used]
    tail = np.arange(used + len(left) - 1, used - 1, -1, dtype=np.int32)
    moved_from = tail[neuron_at[tail] >= 0]
    neuron_at[moved_to] = neuron_at[moved_from]
    last_used[moved_to] = last_used[moved_from]
    slot_of[neuron_at[moved_to]] = moved_to
    neuron_at[moved_from] = -1
    return slot_of[neurons], misses, moved_from, moved_to, used


def merge_reads(offsets, lengths, destinations, gap_bytes, most_bytes, room):
    """Join reads of neighbours on flash; all arrays int64, in order of ``offsets`` to be of use.

    Reads at most ``gap_bytes`` apart become one of at most ``most_bytes``. Where they lie side by
    side in memory too it goes straight there; else to a staging buffer, as far as its ``room``
    allows. Returns three arrays (3, n): the straight reads' offsets, lengths and destinations; the
    staged ones' offsets, lengths and places in the staging buffer; and what is to be copied from
    there: rows' destinations, places and lengths.
    """
    straight, staged, copies = [], [], []
    rows = list(zip(offsets.tolist(), lengths.tolist(), destinations.tolist(), strict=True))
    used, i = 0, 0
    while i < len(rows):
        begin, end, side_by_side, n = rows[i][0], sum(rows[i][:2]), True, 1
        for (_, length, place), (offset, n_bytes, to) in itertools.pairwise(rows[i:]):
            span = offset + n_bytes - begin
            near = end - length <= offset <= end + gap_bytes and span <= most_bytes
            straight_on = side_by_side and offset == end and to == place + length
            if not near or not (straight_on or used + span <= room):
                break
            end, side_by_side, n = offset + n_bytes, straight_on, n + 1
        if side_by_side:
            straight.append((begin, end - begin, rows[i][2]))
        else:
            staged.append((begin, end - begin, used))
            copies += [(to, used + o - begin, size) for o, size, to in rows[i : i + n]]
            used += end - begin
        i += n
    return tuple(np.array(x, dtype=np.int64).reshape(-1, 3).T for x in (straight, staged, copies))


def copy_rows(source, starts, target, places, lengths):
    """target[places[i]:] = source[starts[i]:], ``lengths[i]`` bytes each; all uint8, int64."""
    for start, place, length in zip(
        starts.tolist(), places.tolist(), lengths.tolist(), strict=True
    ):
        target[place : place + length] = source[start : start + length]


class Reader:
    """Many reads of one file in flight, from a pool of threads (paper section 3.2).

    With 0 threads the compiled twin uses io_uring. Raises OSError where that cannot be had.
    """

    def __init__(self, fd, threads):
        if not threads:
            raise OSError(errno.ENOSYS, "not with the NumPy kernels")
        self.fd = fd
        self.pool = ThreadPoolExecutor(threads)

    def submit(self, offsets, lengths, memory, destinations):
        """Start reading ``lengths[i]`` bytes at ``offsets[i]`` to ``memory[destinations[i]:]``.

        Returns a ticket; ``ticket.wait()`` returns when all is read. It raises OSError (errno,
        text, index of the read), or EOFError (index) where the file ends before.
        """
        view = memoryview(memory)
        spans = zip(offsets.tolist(), lengths.tolist(), destinations.tolist(), strict=True)
        return Ticket(
            [self.pool.submit(self._read, o, view[d : d + n]) for o, n, d in spans],
        )

    def _read(self, offset, view):
        done = 0
        while done < len(view):
            count = os.preadv(self.fd, [view[done:]], offset + done)
            if count == 0:
                raise EOFError
            done += count


class Ticket:
    def __init__(self, futures):
        self.futures = futures

    def wait(self):
        failures = [(i, f.exception()) for i, f in enumerate(self.futures) if f.exception()]
        self.futures = []
        for index, failure in failures:
            if isinstance(failure, EOFError):
                raise EOFError(index)
            raise OSError(failure.errno, failure.strerror, index)


def quantise(x):
    """Activations of 8 bits: x (T, d) -> scales (T, blocks, 1) float32, q (T, blocks, 32) int8.

    x is about q * scale; in each block of 32 the largest becomes 127 or -127.
    """
    blocks = x.reshape(len(x), -1, 32)
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


def _sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def _erf(x):
    """Within 1.5e-7 (Abramowitz and Stegun 7.1.26)."""
    size = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * size)
    terms = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    p = np.zeros_like(t)
    for term in terms:
        p = (p + np.float32(term)) * t
    return np.copysign(1 - p * np.exp(-size * size), x)


def _gather(memory, rows, format, columns):
    """The bytes of the rows that begin at these bytes of memory (n, row_bytes)."""
    return memory[rows[:, None] + np.arange(format.row_bytes(columns))]


def _row_of_pair(indptr):
    return np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))


NAMES = (
    "linear", "sparse_up", "sparse_down", "attention", "remember", "rotate", "activate",
    "layer_norm", "rms_norm", "positive", "place", "merge_reads", "copy_rows", "Reader",
)  # fmt: skip
TWINS = {"numpy": {name: globals()[name] for name in NAMES}}
# A thread that has nothing to do spins this often before it sleeps: long enough to be there
# between two products, and no core is burnt while the other waits for reads. GNU's own default
# is 30 times as long. It is read when the library is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
try:
    from flashinfer._native import attention as _attention
    from flashinfer._native import direct_io as _direct_io
    from flashinfer._native import neuron_cache as _neuron_cache
    from flashinfer._native import sparse_matmul as _sparse_matmul
except ImportError:
    pass
else:
    TWINS["native"] = {
        "linear": _sparse_matmul.linear,
        "sparse_up": _sparse_matmul.sparse_up,
        "sparse_down": _sparse_matmul.sparse_down,
        "attention": _attention.attention,
        "remember": _attention.remember,
        "rotate": _attention.rotate,
        "activate": _sparse_matmul.activate,
        "layer_norm": _sparse_matmul.layer_norm,
        "rms_norm": _sparse_matmul.rms_norm,
        "positive": _neuron_cache.positive,
        "place": _neuron_cache.place,
        "merge_reads": _direct_io.merge_reads,
        "copy_rows": _direct_io.copy_rows,
        "Reader": _direct_io.Reader,
    }


def use(kind):
    """Use the "numpy" or the "native" kernels from now on. Raises ValueError for others."""
    if kind not in TWINS:
        raise ValueError(f"no {kind!r} kernels here; there are {', '.join(TWINS)}")
    globals().update(TWINS[kind])
    globals()["in_use"] = kind


def set_threads(threads):
    """Compute with this many threads from now on (the NumPy kernels always with one)."""
    if "native" in TWINS:
        _sparse_matmul.set_threads(threads)
        _attention.set_threads(threads)


def describe():
    """What computes, for people: "native (avx512)" or "numpy"."""
    return f"native ({_sparse_matmul.vector_unit()})" if in_use == "native" else "numpy"


in_use = "numpy"
use(os.environ.get("FLASHINFER_KERNELS") or ("native" if "native" in TWINS else "numpy"))
