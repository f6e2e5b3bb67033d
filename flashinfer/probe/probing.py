"""Measuring a machine and its flash: what ``flashinfer probe`` does, within half a minute."""

import os
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from flashinfer import kernels
from flashinfer.formats.bundle.layout import ATTENTION, HEAD, PREDICTOR
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError
from flashinfer.formats.files import scratch_directory
from flashinfer.formats.number_formats import FORMATS
from flashinfer.model import Model
from flashinfer.paper.flash import Flash
from flashinfer.plan.profile import Profile
from flashinfer.plan.threads import default_threads
from flashinfer.probe import measuring
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import opt_config

FILE_BYTES, LEAST_FILE_BYTES = 768 << 20, 64 << 20
WRITE_SECONDS = 8.0
ROUNDS = 2  # of all that is measured, as a shared machine changes
LAYER_SECONDS = 2.0  # for the small model's tokens, where reads are slow
LAST_ROUND = 12.0  # seconds after which none is begun
BLOCKS = tuple(4096 << k for k in range(9))  # 4 KiB to 1 MiB
TILES = (64 << 10, 128 << 10, 512 << 10, 2 << 20, 4 << 20)  # of streams
SUBMITS = {8 << 10: 128, 128 << 10: 64, 1 << 20: 16}  # {block size: reads at once, as of a layer}
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
    steps, done = 2 + ROUNDS * (len(TILES) + len(BLOCKS) + len(SUBMITS)) + 1, 0

    def more(n=1):
        nonlocal done
        done += n
        progress(min(done, steps), steps)

    try:
        directory, own = _places(Path(path))
        with scratch_directory(directory, "probe") as folder:
            file = own or folder / "probe.bin"
            size = file.stat().st_size if own else _write(file)
            more(2)
            tables, name = _measure(file, size, io, threads, more)
            if not own:
                file.unlink()
            small = folder / "probe.flash"
            layer, cached = _layer(small, threads, tables["linear"], tables["sparse"])
            more(steps)
    except OSError as error:
        raise UserError(f"{path}: cannot be probed: {error.strerror}") from None
    return Profile(
        name=f"{os.uname().nodename}:{os.path.abspath(path)}",
        note=f"measured; kernels: {kernels.describe()}, reads: {name}",
        threads=threads, layer=layer, cached=cached, **tables,
    )  # fmt: skip


def _measure(file, size, io, threads, more):
    """({field of Profile: what was measured}, how was read)"""
    products = {name: measuring.Products(format) for name, format in FORMATS.items()}
    device, dram = [], []

    def between():
        products["f16"].stir()
        for product in products.values():
            product.sample()
        more()

    flash = Flash(file, io)
    try:
        begun = time.perf_counter()
        for number in range(ROUNDS):
            if number and time.perf_counter() - begun > LAST_ROUND:
                break
            device.append(_device(flash, size, between))
            dram.append(measuring.dram_bandwidth(threads))
    finally:
        flash.close()
    tables = {"dram": statistics.fmean(dram), **_averages(device)}
    tables["wake"] = statistics.fmean(product.wake() for product in products.values())
    tables["linear"] = {name: product.linear for name, product in products.items()}
    tables["sparse"] = {name: product.sparse for name, product in products.items()}
    return tables, flash.io


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


def _device(flash, size, between):
    """Profile's tables of reads; ``between`` is called after each measurement."""
    found = {"alone": {}, "reads": {}, "streams": {}, "submit": {}}
    for tile in TILES:
        found["streams"][tile] = measuring.stream(flash, size, tile)
        between()
    for block in BLOCKS:
        found["alone"][block] = measuring.alone(flash, size, block)
        found["reads"][block] = measuring.many(flash, size, block)
        between()
    for block, count in SUBMITS.items():
        found["submit"][block] = measuring.submit(flash, size, block, count)
        between()
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


class _TimedReader:
    """A reader, and what its ``submit`` takes of this thread's time."""

    def __init__(self, reader):
        self.reader, self.seconds = reader, 0.0

    def submit(self, *args):
        begun = time.thread_time()
        ticket = self.reader.submit(*args)
        self.seconds += time.thread_time() - begun
        return ticket


def _layer(path, threads, linear, sparse):
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
            times, reader = [], _TimedReader(model.flash.reader)
            model.flash.reader = reader
            # Where nothing is read, waiting is for the other threads, and counts.
            clock = time.thread_time if window else time.perf_counter
            until = time.perf_counter() + LAYER_SECONDS
            for token in range(5, 69):
                if len(times) > 12 and time.perf_counter() > until:
                    break
                begun, reader.seconds = clock(), 0.0
                model.forward([token])
                times.append(clock() - begun - reader.seconds)
            layers = len(model.layers)
        found.append(max(1e-6, (statistics.fmean(times[8:]) - others) / layers - ffn))
    return found
