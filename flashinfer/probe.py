"""Measuring a machine and its flash: what ``flashinfer probe`` does, within half a minute."""

import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flashinfer import kernels
from flashinfer.flash import Flash, aligned_bytes
from flashinfer.formats.bundle import Bundle, StoredTensor
from flashinfer.formats.errors import UserError
from flashinfer.formats.layout import ATTENTION, HEAD, PREDICTOR
from flashinfer.formats.number_formats import FORMATS
from flashinfer.memory import MAX_BUFFER
from flashinfer.model import Model
from flashinfer.profile import Profile
from flashinfer.shapes import opt_config
from flashinfer.synth import synthesize
from flashinfer.threads import default_threads

FILE_BYTES, LEAST_FILE_BYTES = 768 << 20, 64 << 20
WRITE_SECONDS = 8.0
READ_SECONDS = 0.6  # of each block size
BLOCKS = tuple(4096 << k for k in range(8))  # 4 KiB to 512 KiB
BATCH_BYTES = 32 << 20  # read by one submit; at least BATCH_READS
BATCH_READS = 512
WEIGHT_BYTES = 128 << 20  # beyond any cache
PARTS = 12  # of these, each used once
SHAPE = (1024, 6, 16, 4096)  # of the model that shows what a layer costs besides


def probe(directory, threads=None, io="auto", progress=lambda done, total: None):
    """Measure the device that holds ``directory`` and this CPU; return a Profile.

    Writes a file of at most 768 MiB there, and removes it. Raises UserError where that fails.
    progress is called as progress(steps done, steps in all).
    """
    threads = threads or default_threads()
    kernels.set_threads(threads)
    steps = 6 + len(BLOCKS) + len(FORMATS)
    try:
        with tempfile.TemporaryDirectory(prefix=".flashinfer-probe-", dir=directory) as folder:
            path = Path(folder) / "probe.bin"
            size = _write(path)
            progress(3, steps)
            flash = Flash(path, io)
            try:
                latency = _latency(flash, size)
                sequential = _sequential(flash, size)
                reads, submits = {}, []
                for block in BLOCKS:
                    reads[block], submit = _random(flash, size, block)
                    submits.append(submit)
                    progress(3 + len(reads), steps)
                name = flash.io
            finally:
                flash.close()
            linear, sparse = {}, {}
            for number, format in enumerate(FORMATS.values()):
                linear[format.name], sparse[format.name] = _products(format)
                progress(4 + len(BLOCKS) + number, steps)
            path.unlink()
            dram = dram_bandwidth(threads)
            submit = statistics.median(submits[:4])
            layer, cached = _layer(Path(folder) / "probe.flash", threads, linear, sparse, submit)
            progress(steps, steps)
    except OSError as error:
        raise UserError(f"{directory}: cannot be probed: {error.strerror}") from None
    return Profile(
        name=f"{os.uname().nodename}:{os.path.abspath(directory)}",
        note=f"measured; kernels: {kernels.describe()}, reads: {name}",
        threads=threads, latency=latency, reads=reads, sequential=sequential, dram=dram,
        linear=linear, sparse=sparse, layer=layer, cached=cached, submit=submit,
    )  # fmt: skip


def _write(path):
    """Make a file of random bytes, as large as the time allows; return its size."""
    block = np.random.default_rng(0).integers(0, 256, 16 << 20, dtype=np.uint8)
    free = os.statvfs(path.parent)
    room = free.f_bavail * free.f_frsize // 2
    if room < LEAST_FILE_BYTES:
        raise UserError(f"{path.parent.parent}: has not the {LEAST_FILE_BYTES >> 20} MiB it takes")
    begun, size = time.perf_counter(), 0
    with open(path, "wb", buffering=0) as file:
        while size < min(FILE_BYTES, room):
            file.write(block)
            os.fsync(file.fileno())
            size += len(block)
            if time.perf_counter() - begun > WRITE_SECONDS and size >= LEAST_FILE_BYTES:
                break
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return size


def _latency(flash, size):
    """Seconds of one read of 4 KiB with no other in flight: the median."""
    memory, random, times = aligned_bytes(4096), np.random.default_rng(1), []
    one, zero = np.array([4096]), np.zeros(1, dtype=np.int64)
    for place in random.integers(0, size // 4096, 200):
        begun = time.perf_counter()
        flash.wait(flash.submit(place.reshape(1) * 4096, one, memory, zero))
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _random(flash, size, block):
    """(bytes/s of random reads of one size, as the engine submits a layer's misses; seconds of
    CPU that submitting one takes)."""
    count = int(np.clip(BATCH_BYTES // block, BATCH_READS, size // block // 2))
    memory, random = aligned_bytes(count * block), np.random.default_rng(block)
    lengths = np.full(count, block, dtype=np.int64)
    destinations = np.arange(count, dtype=np.int64) * block
    flash.gap_bytes, speeds, submits = 0, [], []
    until = time.perf_counter() + READ_SECONDS
    while len(speeds) < 2 or time.perf_counter() < until:
        blocks = np.sort(random.choice(size // block // 2, count, replace=False)) * 2
        begun, busy = time.perf_counter(), time.thread_time()
        submitted = flash.submit(blocks * block, lengths, memory, destinations)
        submits.append((time.thread_time() - busy) / count)
        flash.wait(submitted)
        speeds.append(count * block / (time.perf_counter() - begun))
    return statistics.median(speeds), statistics.median(submits)


def _sequential(flash, size):
    """Bytes/s of a stream through a buffer, as what does not fit is read."""
    tensor = StoredTensor("probe", 0, size // 4096, 2048, FORMATS["f16"])
    begun = time.perf_counter()
    for _, stop, _, _ in flash.stream(tensor, aligned_bytes(MAX_BUFFER)):
        seconds, nbytes = time.perf_counter() - begun, stop * tensor.row_bytes
        if seconds > 2 * READ_SECONDS:
            break
    return nbytes / seconds


def dram_bandwidth(threads=None, nbytes=1 << 28, repeats=5):
    """Bytes/s of a plain sum over memory by this many threads, the best of several."""
    threads = threads or default_threads()
    parts = np.array_split(np.ones(nbytes // 8, dtype=np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            list(pool.map(np.sum, parts))
            times.append(time.perf_counter() - begun)
    return nbytes / min(times)


def _products(format, columns=2048):
    """(bytes/s of ``linear``, bytes/s of ``sparse_up`` and ``sparse_down``), with one token."""
    width = format.row_bytes(columns)
    rows = WEIGHT_BYTES // width
    random = np.random.default_rng(2)
    some = format.encode(random.standard_normal((64, columns), dtype=np.float32))
    weights = np.resize(some, (rows, width))
    x = random.standard_normal((1, columns), dtype=np.float32)
    matrix = kernels.Matrix(weights, columns, format)
    linear = weights.nbytes / _median(lambda: kernels.linear(x, matrix))
    # Bundles of two rows, some per cent of them, as a token uses a layer's.
    memory, y, n = weights.reshape(-1), np.zeros_like(x), rows // 2 // PARTS
    parts = iter(np.sort(random.permutation(rows // 2)[: n * PARTS].reshape(PARTS, n), axis=1))

    def layer():
        starts = next(parts) * np.int64(2 * width)
        a = kernels.sparse_up(memory, starts, format, x)
        kernels.sparse_down(memory, starts + width, format, a, y)

    return linear, 2 * width * n / _median(layer, PARTS)


def _median(call, repeats=7):
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _layer(path, threads, linear, sparse, submit):
    """Seconds that a layer takes a token besides its products and reads, from a small model: where
    it stays in DRAM, and where it has a neuron cache."""
    config = opt_config(*SHAPE, vocab_size=512, positions=256)
    used = synthesize(path, config, "f16", fresh=0.01)["layers"][0]["predicted"]
    with Bundle(path) as bundle:
        products = {spec.name: bundle.tensors[spec.name] for spec in bundle.specs}
        rows = SHAPE[3] * used
        ffn = rows * products["layers.0.ffn.bundles"].row_bytes / sparse["f16"]
        others = sum(
            products[spec.name].nbytes / linear[products[spec.name].format.name]
            for spec in bundle.specs
            if spec.role in (ATTENTION, PREDICTOR, HEAD) and len(spec.shape) == 2
        )
    found = []
    for window in (None, 1):
        with Model.open(path, context=64, threads=threads, window=window) as model:
            times = []
            for token in range(5, 69):
                begun, reads = time.thread_time(), model.flash.reads
                model.forward([token])
                busy = time.thread_time() - begun
                times.append(busy - submit * (model.flash.reads - reads))
            layers = len(model.layers)
        found.append(max(1e-6, (statistics.median(times[8:]) - others) / layers - ffn))
    return found
