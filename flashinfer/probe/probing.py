"""Measuring a machine and its flash for ``flashinfer probe``, within half a minute."""

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer import kernels
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError
from flashinfer.formats.files import scratch_directory
from flashinfer.formats.number_formats import FORMATS
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.formats.tensors import ATTENTION, HEAD, PREDICTOR
from flashinfer.model import Model
from flashinfer.paper.flash import Flash
from flashinfer.paper.open_file import Engine
from flashinfer.plan.options import Options
from flashinfer.plan.profile import Profile
from flashinfer.plan.setup import opened, prepare
from flashinfer.plan.threads import default_threads
from flashinfer.probe import measuring
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import opt_config

FILE_BYTES, LEAST_FILE_BYTES = 768 << 20, 64 << 20
WRITE_SECONDS = 8.0  # that writing the file may take, once it has LEAST_FILE_BYTES
ROUNDS = 2  # of all measurements, because the speed of a shared machine changes
LAYER_SECONDS = 2.0  # that the small model's tokens may take where reads are slow
LAST_ROUND = 12.0  # seconds after which no further round begins
BLOCKS = tuple(4096 << k for k in range(9))  # bytes of a read: 4 KiB to 1 MiB
TILES = (64 << 10, 128 << 10, 512 << 10, 2 << 20, 4 << 20)  # bytes, of streams
SUBMITS = {8 << 10: 128, 128 << 10: 64, 1 << 20: 16}  # {bytes of a read: reads at once in a layer}
# Hidden size, layers, heads and neurons of the model that measures a layer's other costs. Its
# products are small, as their time is subtracted.
SHAPE = (256, 12, 4, 4096)

Figures = dict[str, dict[Any, float]]  # {field of Profile: {size or number format: figure}}


def probe(
    path: Path | str,
    threads: int | None = None,
    io: Engine = "auto",
    progress: Progress = no_progress,
) -> Profile:
    """Measure the device that holds ``path``, and this CPU.

    path      a directory, where a file of at most 768 MiB is written, and removed again; or a large
              file such as a model's own, which is read (a disk may read what was just written
              faster)
    threads   to compute with; None: as many as a model uses
    io        how to read, see Flash
    progress  is told the steps done, as "probe"
    Raises UserError where measuring fails.
    """
    threads = threads or default_threads()
    kernels.set_threads(threads)
    steps, done = 2 + ROUNDS * (len(TILES) + len(BLOCKS) + len(SUBMITS)) + 1, 0

    def more(n: int = 1) -> None:
        nonlocal done
        done += n
        progress("probe", min(done, steps), steps)

    try:
        directory, own = _places(Path(path))
        with scratch_directory(directory, "probe") as folder:
            file = own or folder / "probe.bin"
            size = file.stat().st_size if own else write_file(file)
            more(2)
            tables, reader = _measure(file, size, io, threads, more)
            if not own:
                file.unlink()
            small = folder / "probe.flash"
            layer, cached = _layer(small, threads, tables["linear"], tables["sparse"])
            more(steps)
    except OSError as error:
        raise UserError(f"{path}: cannot be probed: {error.strerror}") from None
    return Profile(
        name=f"{os.uname().nodename}:{os.path.abspath(path)}",
        note=f"measured; kernels: {kernels.describe()}, reads: {reader}",
        threads=threads, layer=layer, cached=cached, **tables,
    )  # fmt: skip


def _measure(
    file: Path, size: int, io: Engine, threads: int, more: Callable[[], None]
) -> tuple[dict[str, Any], str]:
    """({field of Profile: its value}, the way of reading that was used)."""
    products = {name: measuring.Products(format) for name, format in FORMATS.items()}
    device: list[Figures] = []
    dram: list[float] = []

    def between() -> None:
        products["f16"].stir()
        for product in products.values():
            product.sample()
        more()

    flash = Flash(file, io, gap_bytes=0)
    try:
        begun = time.perf_counter()
        for number in range(ROUNDS):
            if number and time.perf_counter() - begun > LAST_ROUND:
                break
            device.append(_device(flash, size, between))
            dram.append(measuring.dram_bandwidth(threads))
    finally:
        flash.close()
    tables: dict[str, Any] = {"dram": statistics.fmean(dram), **_averages(device)}
    tables["wake"] = statistics.fmean(product.wake() for product in products.values())
    tables["linear"] = {name: product.linear for name, product in products.items()}
    tables["sparse"] = {name: product.sparse for name, product in products.items()}
    tables["many"] = {name: product.many for name, product in products.items()}
    return tables, flash.io


def _places(path: Path) -> tuple[Path, Path | None]:
    """(the directory to write to, the file to read or None) for the path to probe."""
    if not path.is_file():
        return path, None
    if path.stat().st_size < LEAST_FILE_BYTES:
        raise UserError(
            f"{path}: is smaller than the {LEAST_FILE_BYTES >> 20} MiB it takes; give its directory"
        )
    return path.parent, path


def _averages(rounds: list[Figures]) -> Figures:
    """The means of the figures of several rounds."""
    found: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for tables in rounds:
        for table, figures in tables.items():
            for key, figure in figures.items():
                found[table][key].append(figure)
    return {
        table: {key: statistics.fmean(values) for key, values in figures.items()}
        for table, figures in found.items()
    }


def _device(flash: Flash, size: int, between: Callable[[], None]) -> Figures:
    """Profile's figures of reads; ``between`` is called after each measurement."""
    found: Figures = {"alone": {}, "reads": {}, "streams": {}, "submit": {}}
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


def write_file(path: Path) -> int:
    """Write a file of random bytes, as large as WRITE_SECONDS allow; return its size in bytes."""
    block = np.random.default_rng(0).integers(0, 256, 16 << 20, dtype=np.uint8)
    free = os.statvfs(path.parent)
    room = free.f_bavail * free.f_frsize // 2
    if room < LEAST_FILE_BYTES:
        raise UserError(
            f"{path.parent.parent}: has less room than the {LEAST_FILE_BYTES >> 20} MiB needed"
        )
    begun, size = time.perf_counter(), 0
    with open(path, "wb", buffering=0) as file:
        while size < min(FILE_BYTES, room):
            file.write(block.data)
            os.fsync(file.fileno())
            size += len(block)
            if time.perf_counter() - begun > WRITE_SECONDS and size >= LEAST_FILE_BYTES:
                break
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return size


class _TimedFlash(Flash):
    """Counts the seconds in which this thread hands reads over."""

    seconds = 0.0

    def _send(self, *reads: Any) -> Any:
        begun = time.thread_time()
        ticket = super()._send(*reads)
        self.seconds += time.thread_time() - begun
        return ticket


def _timed_model(path: Path, options: Options) -> tuple[Model, _TimedFlash]:
    """A Model whose reads are timed."""
    bundle = opened(path, options)
    setup = prepare(bundle, options)
    setup.flash.close()
    flash = _TimedFlash(path, options.io, setup.flash.gap_bytes)
    return Model(bundle, replace(setup, flash=flash), no_progress), flash


def _layer(
    path: Path, threads: int, linear: dict[str, float], sparse: dict[str, float]
) -> tuple[float, float]:
    """Seconds per token that a layer takes besides its products and reads.

    path            where a small model is written to measure them
    linear, sparse  {number format: bytes/s}, see Products
    Returns (of a layer that is wholly in DRAM, of a layer with a neuron cache).
    """
    config = opt_config(*SHAPE, vocab_size=512, positions=256)
    used = synthesize(path, config, "f16", fresh=0.01).recorded[0].predicted
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
        options = Options(context=64, threads=threads, window=window)
        model, flash = _timed_model(path, options)
        with model:
            times: list[float] = []
            # Without reads this thread waits only for the other threads, which counts.
            clock = time.thread_time if window else time.perf_counter
            until = time.perf_counter() + LAYER_SECONDS
            for token in range(5, 69):
                if len(times) > 12 and time.perf_counter() > until:
                    break
                begun, flash.seconds = clock(), 0.0
                model.forward([token])
                times.append(clock() - begun - flash.seconds)
            layers = len(model.layers)
        # The median: where other programs run, some tokens wait for a core.
        found.append(max(1e-6, (statistics.median(times[8:]) - others) / layers - ffn))
    return found[0], found[1]
