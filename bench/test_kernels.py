"""pytest bench: kernels and cache bookkeeping against their NumPy twins and the DRAM limit.

``extra_info`` holds bytes/s of weights and the share of what a plain sum over memory reaches.
"""

import numpy as np
import pytest

from flashinfer import kernels
from flashinfer.formats.number_formats import FORMATS
from flashinfer.plan.threads import default_threads
from flashinfer.probe.measuring import dram_bandwidth

ROWS, COLUMNS = 65536, 2048  # 268 MB in f16: more than any cache
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="session")
def limit():
    """Bytes/s of DRAM."""
    return dram_bandwidth()


@pytest.fixture(params=list(kernels.TWINS))
def twin(request):
    kernels.use(request.param)
    kernels.set_threads(default_threads())
    yield request.param
    kernels.use("native" if "native" in kernels.TWINS else "numpy")


def report(benchmark, nbytes, limit):
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = round(nbytes / seconds / 1e9, 2)
    benchmark.extra_info["share of DRAM's"] = round(nbytes / seconds / limit, 2)


def matrix(name, rows=ROWS):
    format = FORMATS[name]
    values = RANDOM.standard_normal((256, COLUMNS), dtype=np.float32)
    raw = np.tile(format.encode(values), (rows // 256, 1))
    return kernels.Matrix(raw, COLUMNS, format)


@pytest.mark.parametrize("name", FORMATS)
def test_linear_one_token(benchmark, twin, limit, name):
    weight = matrix(name)
    x = RANDOM.standard_normal((1, COLUMNS), dtype=np.float32)
    benchmark.pedantic(kernels.linear, (x, weight), rounds=5, warmup_rounds=1)
    report(benchmark, weight.data.nbytes, limit)


@pytest.mark.parametrize("name", ["f16", "q8_0", "q4_0"])
def test_sparse_up_one_token(benchmark, twin, limit, name):
    weight = matrix(name)
    rows = np.arange(0, ROWS, 2, dtype=np.int64) * weight.data.shape[1]  # every other row
    memory = weight.data.reshape(-1)
    x = RANDOM.standard_normal((1, COLUMNS), dtype=np.float32)
    benchmark.pedantic(
        kernels.sparse_up, (memory, rows, weight.format, x), rounds=5, warmup_rounds=1
    )
    report(benchmark, weight.data.nbytes // 2, limit)


@pytest.mark.parametrize("name", ["f16", "q8_0", "q4_0"])
def test_sparse_down_one_token(benchmark, twin, limit, name):
    weight = matrix(name)
    rows = np.arange(0, ROWS, 2, dtype=np.int64) * weight.data.shape[1]
    memory = weight.data.reshape(-1)
    a = np.ones((len(rows), 1), dtype=np.float32)
    y = np.zeros((1, COLUMNS), dtype=np.float32)
    benchmark.pedantic(
        kernels.sparse_down, (memory, rows, weight.format, a, y), rounds=5, warmup_rounds=1
    )
    report(benchmark, weight.data.nbytes // 2, limit)


@pytest.mark.parametrize("name", ["f16", "q8_0", "q4_0"])
def test_linear_128_tokens(benchmark, twin, name):
    weight = matrix(name, rows=2048)
    x = RANDOM.standard_normal((128, COLUMNS), dtype=np.float32)
    benchmark.pedantic(kernels.linear, (x, weight), rounds=3, warmup_rounds=1)
    products = 2 * 128 * 2048 * COLUMNS
    benchmark.extra_info["GFLOP/s"] = round(products / benchmark.stats.stats.median / 1e9, 1)


def test_attention_one_token(benchmark, twin, limit):
    heads, context, width = 32, 2048, 64
    keys = RANDOM.standard_normal((heads, context, width), dtype=np.float32).astype(np.float16)
    q = RANDOM.standard_normal((1, heads, width), dtype=np.float32)
    benchmark.pedantic(
        kernels.attention, (q, keys, keys.copy(), context - 1), rounds=5, warmup_rounds=1
    )
    report(benchmark, 2 * keys.nbytes, limit)


def test_place(benchmark, twin):
    """One layer of opt-1.3b, a window of 5: 280 of 8192 neurons a token, most of them new."""
    neurons, capacity = 8192, 1400
    sets = [np.sort(RANDOM.choice(neurons, 280, replace=False)).astype(np.int32) for _ in range(64)]
    slot_of = np.full(neurons, -1, np.int32)
    neuron_at = np.full(capacity, -1, np.int32)
    last_used, priority = np.zeros(capacity, np.int64), np.zeros(neurons)
    state = {"used": 0, "token": 0}

    def token():
        state["token"] += 1
        wanted = sets[state["token"] % 64]
        *_, state["used"] = kernels.place(
            wanted, state["token"], 5, slot_of, neuron_at, last_used, priority, state["used"]
        )

    benchmark(token)


def test_merge_reads(benchmark, twin):
    """The misses of one layer of opt-1.3b: 230 of 8192 bundles of 8 KiB."""
    rows = np.sort(RANDOM.choice(8192, 230, replace=False)).astype(np.int64)
    lengths = np.full(230, 8192, dtype=np.int64)
    destinations = RANDOM.permutation(600)[:230].astype(np.int64) * 8192
    benchmark(kernels.merge_reads, rows * 8192, lengths, destinations, 4096, 1 << 18, 1 << 21)


def test_layer_norm(benchmark, twin):
    x, weight, bias = RANDOM.standard_normal((3, COLUMNS), dtype=np.float32)
    benchmark(kernels.layer_norm, x[None], weight, bias, 1e-5)


def test_positive(benchmark, twin):
    """A layer of opt-1.3b, of which 4 % fire."""
    scores = RANDOM.standard_normal(8192, dtype=np.float32) - np.float32(1.75)
    benchmark(kernels.positive, scores)


def test_remember(benchmark, twin):
    """One token's keys, 32 heads."""
    cache = np.zeros((32, 2048, 64), dtype=np.float16)
    x = RANDOM.standard_normal((1, 32, 64), dtype=np.float32)
    benchmark(kernels.remember, cache, x, 1000)
