"""Measuring a machine and its flash: what ``flashinfer probe`` does, within half a minute."""

import os
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flashinfer import kernels
from flashinfer.flash import Flash, aligned_bytes
from flashinfer.formats.bundle import Bundle, StoredTensor
from flashinfer.formats.errors import UserError
from flashinfer.formats.layout import ATTENTION, HEAD, PREDICTOR
from flashinfer.formats.number_formats import FORMATS
from flashinfer.model import Model
from flashinfer.profile import Profile
from flashinfer.shapes import opt_config
from flashinfer.synth import synthesize
from flashinfer.threads import default_threads

FILE_BYTES, LEAST_FILE_BYTES = 768 << 20, 64 << 20
WRITE_SECONDS = 8.0
ROUNDS = 2  # of all that is measured, as a shared machine changes
LAYER_SECONDS = 2.0  # for the small model's tokens, where reads are slow
LAST_ROUND = 12.0  # seconds after which none is begun
READ_SECONDS = 0.3  # of each block size
BLOCKS = tuple(4096 << k for k in range(9))  # 4 KiB to 1 MiB
TILES = (64 << 10, 128 << 10, 512 << 10, 2 << 20, 4 << 20)  # of streams
SUBMITS = {8 << 10: 128, 128 << 10: 64, 1 << 20: 16}  # {block size: reads at once, as of a layer}
ALONE = 100  # reads of each block size, one after the other, or what READ_SECONDS allow
BATCH_BYTES = 32 << 20  # read by one submit, or what READ_SECONDS allow; at least BATCH_READS
BATCH_READS = 64
MEANWHILE_BYTES = 8 << 20  # multiplied while reads are in flight
WEIGHT_BYTES = 128 << 20  # beyond any cache
MATRIX_BYTES = 4 << 20  # multiplied at once, as a layer's matrices are
REPEATS = 7
PARTS = 12  # of these, each used once
# Of the model that shows what a layer costs besides: products small, as they are taken off again.
SHAPE = (256, 12, 4, 4096)


def probe(path, threads=None, io="auto", progress=lambda done, total: None):
    """Measure the device that holds ``path`` and this CPU; return a Profile.

    path  a directory: a file of at most 768 MiB is written there, and removed; or a large file, a
          model's own, which is read (a disk may be faster for what was just written to it)
    Raises UserError where that fails.
    progress is called as progress(steps done, steps in all).
    """
    threads = threads or default_threads()
    kernels.set_threads(threads)
    steps, done = 2 + ROUNDS * (1 + len(FORMATS)) + 1, 0

    def more(n=1):
        nonlocal done
        done += n
        progress(min(done, steps), steps)

    try:
        directory, own = _places(Path(path))
        with tempfile.TemporaryDirectory(prefix=".flashinfer-probe-", dir=directory) as folder:
            file = own or Path(folder) / "probe.bin"
            size = file.stat().st_size if own else _write(file)
            more(2)
            device, products, dram = [], [], []
            flash = Flash(file, io)
            try:
                begun = time.perf_counter()
                for number in range(ROUNDS):
                    if number and time.perf_counter() - begun > LAST_ROUND:
                        break
                    device.append(_device(flash, size))
                    more()
                    for format in FORMATS.values():
                        products.append(_products(format))
                        more()
                    dram.append(dram_bandwidth(threads))
                name = flash.io
            finally:
                flash.close()
            if not own:
                file.unlink()
            found, speeds = _averages(device), _averages(products)
            submit = min(found["submit"].values())
            layer = _layer(Path(folder) / "probe.flash", threads, **speeds, submit=submit)
            more(steps)
    except OSError as error:
        raise UserError(f"{path}: cannot be probed: {error.strerror}") from None
    return Profile(
        name=f"{os.uname().nodename}:{os.path.abspath(path)}",
        note=f"measured; kernels: {kernels.describe()}, reads: {name}",
        threads=threads, dram=statistics.fmean(dram), layer=layer[0], cached=layer[1],
        **found, **speeds,
    )  # fmt: skip


def _places(path):
    """(directory to write to, file to read or None) of what is to be probed."""
    if not path.is_file():
        return path, None
    if path.stat().st_size < LEAST_FILE_BYTES:
        raise UserError(
            f"{path}: is smaller than the {LEAST_FILE_BYTES >> 20} MiB it takes; give its directory"
        )
    return path.parent, path


def _averages(rounds):
    """{table: {key: mean}} of what several rounds found as {table: {key: figure}}."""
    found = defaultdict(lambda: defaultdict(list))
    for tables in rounds:
        for table, figures in tables.items():
            for key, figure in figures.items():
                found[table][key].append(figure)
    return {
        table: {key: statistics.fmean(values) for key, values in figures.items()}
        for table, figures in found.items()
    }


def _device(flash, size):
    """Profile's tables of reads."""
    found = {"alone": {}, "reads": {}, "streams": {}}
    for tile in TILES:
        found["streams"][tile] = _stream(flash, size, tile)
    for block in BLOCKS:
        found["alone"][block] = _alone(flash, size, block)
        found["reads"][block] = _random(flash, size, block)
    found["submit"] = {block: _submit(flash, size, block, n) for block, n in SUBMITS.items()}
    return found


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


def _alone(flash, size, block):
    """Seconds of one read of this size with no other in flight: the mean, as a token sees it."""
    memory, random = aligned_bytes(block), np.random.default_rng(1)
    length, zero = np.array([block]), np.zeros(1, dtype=np.int64)
    times = []
    for place in random.integers(0, size // block, 1 + ALONE):
        begun = time.perf_counter()
        flash.wait(flash.submit(place.reshape(1) * block, length, memory, zero))
        times.append(time.perf_counter() - begun)
        if len(times) > 4 and sum(times) > READ_SECONDS:
            break
    return statistics.fmean(times[1:])  # before the first the memory's pages are not there


def _random(flash, size, block):
    """Bytes/s of random reads of one size, very many at once."""
    least = min(BATCH_READS, size // block // 2)
    some = _batches(flash, size, block, least)
    allowed = READ_SECONDS / _seconds(lambda: flash.wait(some()), 1) * least
    count = int(np.clip(min(BATCH_BYTES // block, allowed), least, size // block // 2))
    batch, batches = _batches(flash, size, block, count), 0
    flash.wait(batch())  # the memory's pages are there now
    begun = time.perf_counter()
    while batches < 2 or time.perf_counter() < begun + READ_SECONDS:
        flash.wait(batch())
        batches += 1
    return batches * count * block / (time.perf_counter() - begun)


def _batches(flash, size, block, count):
    """A function that submits ``count`` reads at random places, as the engine a layer's misses."""
    memory, random = aligned_bytes(count * block), np.random.default_rng(block)
    lengths = np.full(count, block, dtype=np.int64)
    destinations = np.arange(count, dtype=np.int64) * block
    flash.gap_bytes = 0

    def batch():
        blocks = np.sort(random.choice(size // block // 2, count, replace=False)) * 2
        return flash.submit(blocks * block, lengths, memory, destinations)

    return batch


def _submit(flash, size, block, count):
    """Seconds of the CPU's that a read takes: to submit it, and what it delays, when it ends, of
    what is computed meanwhile."""
    batch = _batches(flash, size, block, min(count, size // block // 2))
    x, matrix = _matrix(FORMATS["f16"], MEANWHILE_BYTES)
    products = 1

    def compute(before=lambda: None):
        begun = time.perf_counter()
        submitted = before()
        for _ in range(products):
            kernels.linear(x, matrix)
        seconds = time.perf_counter() - begun
        if submitted is not None:
            flash.wait(submitted)
        return seconds

    products = round(_seconds(lambda: flash.wait(batch())) / _seconds(compute)) or 1
    by_itself, beside = [], []
    until = time.perf_counter() + READ_SECONDS
    while len(beside) < 2 or time.perf_counter() < until:
        by_itself.append(compute())
        beside.append(compute(batch))
    return max(1e-9, (statistics.fmean(beside) - statistics.fmean(by_itself)) / count)


def _stream(flash, size, tile):
    """Bytes/s of a stream in tiles of about this size, each multiplied with one token meanwhile,
    as what does not fit is read."""
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
    """Bytes/s of ``linear``, and of ``sparse_up`` and ``sparse_down``, with one token."""
    x, matrix = _matrix(format, WEIGHT_BYTES, columns)
    weights, random = matrix.data, np.random.default_rng(2)
    rows, width = weights.shape
    step = max(1, MATRIX_BYTES // width)
    matrices = [
        kernels.Matrix(weights[i : i + step], columns, format) for i in range(0, rows, step)
    ]

    def products():
        for one in matrices:
            kernels.linear(x, one)

    linear = weights.nbytes / _seconds(products)
    # Bundles of two rows, some per cent of them, as a token uses a layer's.
    memory, y, n = weights.reshape(-1), np.zeros_like(x), rows // 2 // (PARTS + 1)
    parts = iter(np.sort(random.permutation(rows // 2)[: n * (PARTS + 1)].reshape(-1, n), axis=1))

    def layer():
        starts = next(parts) * np.int64(2 * width)
        a = kernels.sparse_up(memory, starts, format, x)
        kernels.sparse_down(memory, starts + width, format, a, y)

    sparse = 2 * width * n / _seconds(layer, PARTS)
    return {"linear": {format.name: linear}, "sparse": {format.name: sparse}}


def _matrix(format, nbytes, columns=2048):
    """(x (1, columns), a Matrix of about so many bytes) to multiply."""
    width, random = format.row_bytes(columns), np.random.default_rng(2)
    some = format.encode(random.standard_normal((64, columns), dtype=np.float32))
    matrix = kernels.Matrix(np.resize(some, (nbytes // width, width)), columns, format)
    return random.standard_normal((1, columns), dtype=np.float32), matrix


def _seconds(call, repeats=REPEATS):
    """What a call takes: the mean, as a token sees it, once the first has warmed up."""
    call()
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begun) / repeats


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
            # Where nothing is read, waiting is for the other threads, and counts.
            clock = time.thread_time if window else time.perf_counter
            until = time.perf_counter() + LAYER_SECONDS
            for token in range(5, 69):
                if len(times) > 12 and time.perf_counter() > until:
                    break
                begun, reads = clock(), model.flash.reads
                model.forward([token])
                times.append(clock() - begun - submit * (model.flash.reads - reads))
            layers = len(model.layers)
        found.append(max(1e-6, (statistics.fmean(times[8:]) - others) / layers - ffn))
    return found
