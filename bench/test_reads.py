"""pytest bench: the engine's reads into a cache's rows, against fio (or dd) at the same size."""

import os

import numpy as np
import pytest

from bench.limits import random_read_bandwidth
from flashinfer import kernels
from flashinfer.paper.flash import Flash, aligned_bytes

SIZE = 1 << 30


@pytest.fixture(scope="session")
def file():
    """1 GiB on the disk that holds the working directory."""
    path = f"bench-reads-{os.getpid()}.bin"
    block = np.random.default_rng(0).integers(0, 256, 1 << 24, dtype=np.uint8).tobytes()
    try:
        with open(path, "wb") as out:
            for _ in range(SIZE >> 24):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        yield path
    finally:
        os.unlink(path)


@pytest.fixture(params=list(kernels.TWINS))
def twin(request):
    kernels.use(request.param)
    yield request.param
    kernels.use("native" if "native" in kernels.TWINS else "numpy")


@pytest.mark.parametrize("kib", [4, 8, 16, 32, 128])
def test_random_reads(benchmark, twin, file, kib):
    """As the engine reads a layer's misses: one submit of many blocks, one wait."""
    block, random = kib << 10, np.random.default_rng(1)
    count = (64 << 20) // block
    memory, flash = aligned_bytes(count * block), Flash(file)
    destinations = np.arange(count, dtype=np.int64) * block
    lengths = np.full(count, block, dtype=np.int64)

    def read():
        blocks = np.sort(random.choice(SIZE // block, count, replace=False))
        flash.wait(flash.submit(blocks.astype(np.int64) * block, lengths, memory, destinations))

    benchmark.pedantic(read, rounds=5, warmup_rounds=1)
    flash.close()
    speed = count * block / benchmark.stats.stats.median
    benchmark.extra_info["MB/s"] = round(speed / 1e6)
    benchmark.extra_info["share of fio's"] = round(speed / random_read_bandwidth(file, block), 2)


def test_sequential_stream(benchmark, twin, file):
    """As a dense layer is read: megabyte pieces, two tiles in turn."""
    from flashinfer.formats.bundle.stored import StoredTensor
    from flashinfer.formats.number_formats import FORMATS

    tensor = StoredTensor("t", 0, 65536, 4096, FORMATS["f16"])  # 512 MiB
    flash, buffer = Flash(file), aligned_bytes(8 << 20)
    benchmark.pedantic(
        lambda: sum(1 for _ in flash.stream(tensor, buffer)), rounds=3, warmup_rounds=1
    )
    flash.close()
    speed = tensor.nbytes / benchmark.stats.stats.median
    benchmark.extra_info["MB/s"] = round(speed / 1e6)
    limit = random_read_bandwidth(file, 1 << 20)
    benchmark.extra_info["share of fio's at 1 MiB"] = round(speed / limit, 2)
