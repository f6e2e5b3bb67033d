"""The measurements that ``probe`` consists of: reads of a file, products, and memory."""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from flashinfer import kernels
from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.formats.number_formats import FORMATS, NumberFormat
from flashinfer.paper.flash import Flash, Submitted, aligned_bytes
from flashinfer.plan.profile import MANY
from flashinfer.plan.threads import default_threads

Submit = Callable[[], Any]  # starts reads; Flash.wait waits for what it returns

READ_SECONDS = 0.3  # that measuring one block size may take
ALONE = 100  # reads of a block size one after the other, or as many as READ_SECONDS allow
# Bytes that one submit reads, or as many as READ_SECONDS allow, but at least BATCH_READS reads.
BATCH_BYTES = 32 << 20
BATCH_READS = 64
MEANWHILE_BYTES = 8 << 20  # of weights multiplied while reads are in flight
WEIGHT_BYTES = 32 << 20  # of weights of each number format: together more than any cache holds
MATRIX_BYTES = 4 << 20  # of weights multiplied at once, as in a layer's matrices
ACTIVE = 0.08  # share of the rows that a sparse product uses
STIR_SECONDS = 0.02  # until the scheduler has given each thread a core of its own
MANY_MATRICES = 2  # of those multiplied with one token, as they take longer
WAKES = 40  # products after a pause, and as many without one


def alone(flash: Flash, size: int, block: int) -> float:
    """Seconds of one read with no other in flight: the mean, as a token sees it.

    size, block  bytes of the file, and of a read
    """
    memory, random = aligned_bytes(block), np.random.default_rng(1)
    length, zero = np.array([block]), np.zeros(1, dtype=np.int64)
    times = []
    for place in random.integers(0, size // block, 1 + ALONE):
        begun = time.perf_counter()
        flash.wait(flash.submit(place.reshape(1) * block, length, memory, zero))
        times.append(time.perf_counter() - begun)
        if len(times) > 4 and sum(times) > READ_SECONDS:
            break
    return statistics.fmean(times[1:])  # the first read also allocates the memory's pages


def many(flash: Flash, size: int, block: int) -> float:
    """Bytes/s of random reads of ``block`` bytes, very many at once."""
    least = min(BATCH_READS, size // block // 2)
    some = _batches(flash, size, block, least)
    allowed = READ_SECONDS / _seconds(lambda: flash.wait(some()), 1) * least
    count = int(np.clip(min(BATCH_BYTES // block, allowed), least, size // block // 2))
    batch, batches = _batches(flash, size, block, count), 0
    flash.wait(batch())  # allocates the memory's pages
    begun = time.perf_counter()
    while batches < 2 or time.perf_counter() < begun + READ_SECONDS:
        flash.wait(batch())
        batches += 1
    return batches * count * block / (time.perf_counter() - begun)


def in_flight(flash: Flash, size: int, block: int, count: int) -> float:
    """Bytes/s of random reads of ``block`` bytes, always ``count`` of them in flight."""
    memory, random = aligned_bytes(count * block), np.random.default_rng(block)
    length = np.array([block])
    flying: deque[Submitted] = deque()
    begun, done = time.perf_counter(), 0
    while time.perf_counter() < begun + READ_SECONDS:
        if len(flying) == count:
            flash.wait(flying.popleft())
            done += 1
        place = random.integers(0, size // block, 1) * block
        destination = np.array([(done + len(flying)) % count * block])
        flying.append(flash.submit(place, length, memory, destination))
    while flying:
        flash.wait(flying.popleft())
        done += 1
    return done * block / (time.perf_counter() - begun)


def _batches(flash: Flash, size: int, block: int, count: int) -> Submit:
    """A function that submits ``count`` reads at random offsets, as the engine a layer's misses."""
    memory, random = aligned_bytes(count * block), np.random.default_rng(block)
    lengths = np.full(count, block, dtype=np.int64)
    destinations = np.arange(count, dtype=np.int64) * block

    def batch() -> Any:
        blocks = np.sort(random.choice(size // block // 2, count, replace=False)) * 2
        return flash.submit(blocks * block, lengths, memory, destinations)

    return batch


def submit(flash: Flash, size: int, block: int, count: int) -> float:
    """The CPU's seconds per read of ``block`` bytes, of ``count`` submitted together.

    They are the time to submit the read, and the delay that its completion causes to a computation
    that runs meanwhile.
    """
    batch = _batches(flash, size, block, min(count, size // block // 2))
    x, matrix = _matrix(FORMATS["f16"], MEANWHILE_BYTES)
    products = 1

    def compute(before: Submit = lambda: None) -> float:
        begun = time.perf_counter()
        submitted = before()
        for _ in range(products):
            kernels.linear(x, matrix)
        seconds = time.perf_counter() - begun
        if submitted is not None:
            flash.wait(submitted)
        return seconds

    products = round(_seconds(lambda: flash.wait(batch())) / _seconds(compute)) or 1
    by_itself: list[float] = []
    beside: list[float] = []
    until = time.perf_counter() + READ_SECONDS
    while len(beside) < 2 or time.perf_counter() < until:
        by_itself.append(compute())
        beside.append(compute(batch))
    return max(1e-9, (statistics.fmean(beside) - statistics.fmean(by_itself)) / count)


def stream(flash: Flash, size: int, tile: int) -> float:
    """Bytes/s of a stream in tiles of about ``tile`` bytes.

    Each tile is multiplied with one token while the next is read, as with weights that do not fit
    in DRAM.
    """
    tensor = StoredTensor("probe", 0, size // 4096, 2048, FORMATS["f16"])
    x = np.ones((1, tensor.columns), dtype=np.float32)
    begun = time.perf_counter()
    for _, stop, memory, starts in flash.stream(tensor, aligned_bytes(2 * tile)):
        rows = memory[starts[0] : starts[-1] + tensor.row_bytes].reshape(-1, tensor.row_bytes)
        kernels.linear(x, kernels.Matrix(rows, tensor.columns, tensor.format))
        seconds, nbytes = time.perf_counter() - begun, stop * tensor.row_bytes
        if seconds > READ_SECONDS:
            break
    return nbytes / seconds


def dram_bandwidth(threads: int | None = None, nbytes: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes/s of a plain sum over memory by this many threads, the best of ``repeats``.

    threads  None: as many as a model uses
    """
    threads = threads or default_threads()
    parts = np.array_split(np.ones(nbytes // 8, dtype=np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            list(pool.map(np.sum, parts))
            times.append(time.perf_counter() - begun)
    return nbytes / min(times)


class Products:
    """The products of one number format, with one token and with ``profile.MANY``.

    They are sampled several times during a probe, because the memory's speed on a shared machine
    changes from second to second.
    """

    def __init__(self, format: NumberFormat, columns: int = 2048) -> None:
        self.x, matrix = _matrix(format, WEIGHT_BYTES, columns)
        self.weights, self.format, self.random = matrix.data, format, np.random.default_rng(2)
        step = max(1, MATRIX_BYTES // self.weights.shape[1])
        self.matrices = [
            kernels.Matrix(self.weights[i : i + step], columns, format)
            for i in range(0, len(self.weights), step)
        ]
        # Seconds per byte, of each sample.
        self.linears: list[float] = []
        self.several: list[float] = []
        self.sparses: list[float] = []

    def sample(self) -> None:
        """Measure each product once."""
        rows, width = self.weights.shape
        kernels.linear(self.x, self.matrices[0])  # wakes the threads
        begun = time.perf_counter()
        for matrix in self.matrices[1:]:
            kernels.linear(self.x, matrix)
        multiplied = rows * width - self.matrices[0].data.nbytes
        self.linears.append((time.perf_counter() - begun) / multiplied)
        begun = time.perf_counter()
        for matrix in self.matrices[1 : 1 + MANY_MATRICES]:
            kernels.linear(np.repeat(self.x, MANY, axis=0), matrix)
        multiplied = sum(matrix.data.nbytes for matrix in self.matrices[1 : 1 + MANY_MATRICES])
        self.several.append((time.perf_counter() - begun) / multiplied)
        # Some per cent of bundles of two rows, as a token uses those of a layer.
        bundles = np.sort(self.random.choice(rows // 2, int(ACTIVE * rows / 2), replace=False))
        starts, y = bundles * np.int64(2 * width), np.zeros_like(self.x)
        begun = time.perf_counter()
        a = kernels.sparse_up(self.weights.reshape(-1), starts, self.format, self.x)
        kernels.sparse_down(self.weights.reshape(-1), starts + width, self.format, a, y)
        self.sparses.append((time.perf_counter() - begun) / (2 * width * len(starts)))

    def stir(self) -> None:
        """Compute for some milliseconds, because a machine that was idle for long begins slowly."""
        until = time.perf_counter() + STIR_SECONDS
        while time.perf_counter() < until:
            kernels.linear(self.x, self.matrices[0])

    def wake(self) -> float:
        """Seconds that a product takes longer when its threads sleep."""
        self.stir()
        asleep: list[float] = []
        awake: list[float] = []
        matrices = itertools.cycle(self.matrices)
        for _ in range(WAKES):
            for times, pause in ((asleep, 1e-3), (awake, 0.0)):
                time.sleep(pause)
                begun = time.perf_counter()
                kernels.linear(self.x, next(matrices))
                times.append(time.perf_counter() - begun)
        return max(1e-7, statistics.median(asleep) - statistics.median(awake))

    @property
    def linear(self) -> float:
        """Bytes/s of ``kernels.linear``."""
        return 1 / statistics.fmean(self.linears)

    @property
    def many(self) -> float:
        """How many times as long ``kernels.linear`` takes with ``profile.MANY`` tokens."""
        return statistics.fmean(self.several) / statistics.fmean(self.linears)

    @property
    def sparse(self) -> float:
        """Bytes/s of ``kernels.sparse_up`` and ``sparse_down``."""
        return 1 / statistics.fmean(self.sparses)


def _matrix(
    format: NumberFormat, nbytes: int, columns: int = 2048
) -> tuple[Float32Array, kernels.Matrix]:
    """(x (1, columns), a Matrix of about ``nbytes``) to multiply."""
    width, random = format.row_bytes(columns), np.random.default_rng(2)
    some = format.encode(random.standard_normal((64, columns), dtype=np.float32))
    matrix = kernels.Matrix(np.resize(some, (nbytes // width, width)), columns, format)
    return random.standard_normal((1, columns), dtype=np.float32), matrix


def _seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """The mean seconds of a call, after one that warms up."""
    call()
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begun) / repeats
