"""Each hot path against float64 NumPy, both twins; and the order of sums, by equal bits."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA
from flashinfer import kernels
from flashinfer.formats.layers import ffn
from flashinfer.formats.number_formats import FORMATS
from flashinfer.kernels.activations import ACTIVATIONS
from flashinfer.kernels.attention import widened
from flashinfer.kernels.sparse_matmul import round_tokens
from flashinfer.transformer.kv_cache import ELEMENTS, KV_DTYPES

RANDOM = np.random.default_rng(3)
WIDTHS = [
    (name, columns)
    for name, format in FORMATS.items()
    for columns in (1, 31, 32, 33, 64, 96, 100, 256, 257, 1024, 1280)
    if columns % format.block == 0
]


def weights(rows, columns, name, random=RANDOM):
    """(Matrix, its values in float64)."""
    format = FORMATS[name]
    raw = format.encode(random.standard_normal((rows, columns)).astype(np.float32))
    return kernels.Matrix(raw, columns, format), format.decode(raw).astype(np.float64)


def scattered(rows, columns, name, random=RANDOM):
    """Rows at odd places of a larger memory: (memory, starts, format, values)."""
    matrix, values = weights(rows, columns, name, random)
    width = matrix.data.shape[1]
    memory = np.full(3 * rows * (width + 16) + 64, 255, dtype=np.uint8)
    item = 4 if name == "f32" else 2
    starts = random.permutation(rows) * (width + 16) // item * item + item
    for row, start in zip(matrix.data, starts, strict=True):
        memory[start : start + width] = row
    return memory, starts.astype(np.int64), matrix.format, values


def close(found, expected, columns):
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.sqrt(columns) * 4 + 1e-6)


def seen(x, format):
    """x as a product with weights of this format takes it, in float64."""
    if format.block == 1:
        return x.astype(np.float64)
    scales, q = kernels.quantise(x)
    return (scales.astype(np.float64) * q).reshape(x.shape)


def pairs(random, rows, n_tokens, share=0.4):
    """A random choice of (row, token) pairs: (mask (rows, tokens), indptr, tokens)."""
    mask = random.random((rows, n_tokens)) < share
    indptr = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32)
    return mask, indptr, np.nonzero(mask)[1].astype(np.int32)


@pytest.mark.parametrize("name, columns", WIDTHS)
def test_linear(twin, name, columns):
    matrix, values = weights(70, columns, name)
    bias = RANDOM.standard_normal(70).astype(np.float32)
    for n_tokens in (1, 3, 4, 9):
        x = RANDOM.standard_normal((n_tokens, columns)).astype(np.float32)
        expected = seen(x, matrix.format) @ values.T
        close(kernels.linear(x, matrix, bias), expected + bias, columns)
        close(kernels.linear(x, matrix), expected, columns)


@pytest.mark.parametrize("name, columns", WIDTHS)
def test_products_of_rounded_tokens(twin, name, columns):
    """A token has one scale; and its products are the same alone, in tiles, and by threads, and
    with rows that lie anywhere."""
    matrix, values = weights(70, columns, name)
    starts = RANDOM.permutation(70)
    memory = matrix.data[starts].reshape(-1)
    starts = np.argsort(starts) * matrix.data.shape[1]
    bias = RANDOM.standard_normal(70).astype(np.float32)
    x = RANDOM.standard_normal((37, columns)).astype(np.float32)
    x[3] = 0
    x[4] *= np.float32(1e-9)  # below the least scale
    x[5, :-1] *= np.float32(1e-3)
    scales, q = round_tokens(x)
    assert scales.shape == (37, 1) and q.shape == x.shape and not q[3:5].any()
    sure = np.delete(np.arange(37), [3, 4])
    assert (np.abs(q[sure]).max(axis=1) == 127).all()
    assert (np.abs(q * scales - x)[sure] <= 0.5001 * scales[sure]).all()
    whole = kernels.linear(x, matrix, None, True)
    close(whole, (q * scales.astype(np.float64)) @ values.T, columns)
    biased = (kernels.linear(x, matrix, bias, True)).T
    mask, indptr, tokens = pairs(RANDOM, 70, 37)
    rows = memory, starts, matrix.format
    try:
        for threads in (1, 3):
            kernels.set_threads(threads)
            found = kernels.sparse_up(*rows, x, bias, indptr, tokens, True)
            assert np.array_equal(found, biased[mask])
            for n in (1, 2, 9, 37):
                assert np.array_equal(kernels.linear(x[:n], matrix, None, True), whole[:n])
                found = kernels.sparse_up(*rows, x[:n], bias, rounded=True)
                assert np.array_equal(found, biased[:, :n])
            for t in range(37):
                assert np.array_equal(kernels.linear(x[t : t + 1], matrix, None, True)[0], whole[t])
    finally:
        kernels.set_threads(1)


def test_activations_of_8_bits():
    """Each block's largest is exact, the others within half a step; zeros and NaN do no harm."""
    random = np.random.default_rng(3)
    x = random.standard_normal((5, 96)).astype(np.float32)
    x[2, 32:64] = 0
    scales, q = kernels.quantise(x)
    blocks = x.reshape(5, 3, 32)
    assert scales.shape == (5, 3, 1) and q.dtype == np.int8
    assert np.abs(scales * q - blocks).max() <= 0.5001 * scales.max()
    assert (np.abs(q).max(axis=-1) == 127).sum() == 14 and not q[2, 1].any()
    matrix, values = weights(9, 96, "q8_0", random)
    exact, found = x @ values.T, kernels.linear(x, matrix)
    assert np.abs(found - exact).max() < 0.01 * np.abs(exact).max()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_nonsense_activations_crash_nothing(bad):
    x = np.ones((1, 64), dtype=np.float32)
    x[0, 40] = bad
    matrix, _ = weights(3, 64, "q4_0")
    for name, twin in kernels.TWINS.items():
        with np.errstate(all="ignore"):
            assert twin["linear"](x, matrix).shape == (1, 3), name


@pytest.mark.parametrize("name, columns", WIDTHS)
def test_sparse_up_and_down(twin, name, columns):
    memory, starts, format, values = scattered(37, columns, name)
    bias = RANDOM.standard_normal(37).astype(np.float32)
    for n_tokens in (1, 2, 7):
        x = RANDOM.standard_normal((n_tokens, columns)).astype(np.float32)
        expected = values @ seen(x, format).T + bias[:, None]
        close(kernels.sparse_up(memory, starts, format, x, bias), expected, columns)
        mask, indptr, tokens = pairs(RANDOM, 37, n_tokens)
        found = kernels.sparse_up(memory, starts, format, x, bias, indptr, tokens)
        close(found, expected[mask], columns)

        a = np.maximum(RANDOM.standard_normal((37, n_tokens)), 0).astype(np.float32)
        y = RANDOM.standard_normal((n_tokens, columns)).astype(np.float32)
        expected = y + a.T @ values
        kernels.sparse_down(memory, starts, format, a, y)
        close(y, expected, 37)
        expected = y + np.where(mask, a, 0).T @ values
        kernels.sparse_down(memory, starts, format, a[mask], y, indptr, tokens)
        close(y, expected, 37)


@pytest.mark.parametrize("name", FORMATS)
def test_no_split_changes_a_bit(twin, name):
    """Rows in pieces, tokens one by one or together, one thread or four: the same bits."""
    columns, n_tokens = (224 if FORMATS[name].block <= 32 else 768), 11
    memory, starts, format, _ = scattered(150, columns, name)  # more than a panel
    matrix, _ = weights(150, columns, name)
    x = RANDOM.standard_normal((n_tokens, columns)).astype(np.float32)
    a = kernels.sparse_up(memory, starts, format, x)
    whole = kernels.linear(x, matrix)
    y = np.zeros_like(x)
    kernels.sparse_down(memory, starts, format, np.maximum(a, 0), y)
    try:
        for threads in (1, 2, 4):
            kernels.set_threads(threads)
            assert np.array_equal(whole, kernels.linear(x, matrix))
            for cut in (1, 67, 149):
                parts = [
                    kernels.linear(
                        x, kernels.Matrix(np.ascontiguousarray(d), columns, matrix.format)
                    )
                    for d in (matrix.data[:cut], matrix.data[cut:])
                ]
                assert np.array_equal(whole, np.concatenate(parts, axis=1))
                again = np.zeros_like(x)
                for rows in (slice(0, cut), slice(cut, None)):
                    part = kernels.sparse_up(memory, starts[rows], format, x)
                    assert np.array_equal(part, a[rows])
                    kernels.sparse_down(memory, starts[rows], format, np.maximum(part, 0), again)
                assert np.array_equal(again, y)
            for t in range(n_tokens):
                one = x[t : t + 1]
                assert np.array_equal(kernels.linear(one, matrix)[0], whole[t])
                part = kernels.sparse_up(memory, starts, format, one)
                assert np.array_equal(part[:, 0], a[:, t])
                again = np.zeros((1, columns), dtype=np.float32)
                kernels.sparse_down(memory, starts, format, np.maximum(part, 0), again)
                assert np.array_equal(again[0], y[t])
            mask, indptr, tokens = pairs(np.random.default_rng(1), 150, n_tokens)
            found = kernels.sparse_up(memory, starts, format, x, None, indptr, tokens)
            assert np.array_equal(found, a[mask])
            again = np.zeros_like(x)
            kernels.sparse_down(memory, starts, format, np.maximum(found, 0), again, indptr, tokens)
            full = np.zeros_like(x)
            kernels.sparse_down(memory, starts, format, np.where(mask, np.maximum(a, 0), 0), full)
            assert np.array_equal(again, full)
    finally:
        kernels.set_threads(1)


@pytest.mark.parametrize("name, columns", WIDTHS)
@pytest.mark.parametrize("rows", [1, 5, 24, 53])
def test_no_tile_changes_a_bit(twin, name, columns, rows):
    """Rows, tokens and columns that are not whole tiles: each token as by itself."""
    random = np.random.default_rng(rows)
    memory, starts, format, _ = scattered(rows, columns, name, random)
    matrix, _ = weights(rows, columns, name, random)
    bias = random.standard_normal(rows).astype(np.float32)
    x = random.standard_normal((29, columns)).astype(np.float32)
    factors = random.standard_normal((rows, len(x))).astype(np.float32)
    factors[rows // 2, 20:25] = 0  # among tokens that use every row some that do not
    ones = [x[t : t + 1] for t in range(len(x))]
    linear = np.concatenate([kernels.linear(one, matrix, bias) for one in ones])
    up = np.concatenate([kernels.sparse_up(memory, starts, format, one) for one in ones], axis=1)
    down = np.zeros_like(x)
    for t in range(len(x)):
        a = np.ascontiguousarray(factors[:, t : t + 1])
        kernels.sparse_down(memory, starts, format, a, down[t : t + 1])
    try:
        for threads in (1, 2, 3):
            kernels.set_threads(threads)
            for n in (*range(4, 23), 29):
                assert np.array_equal(kernels.linear(x[:n], matrix, bias), linear[:n])
                found = kernels.sparse_up(memory, starts, format, x[:n])
                assert np.array_equal(found, up[:, :n])
                y = np.zeros_like(x[:n])
                a = np.ascontiguousarray(factors[:, :n])
                kernels.sparse_down(memory, starts, format, a, y)
                assert np.array_equal(y, down[:n])
    finally:
        kernels.set_threads(1)


@pytest.mark.parametrize("name", FORMATS)
def test_many_tokens_in_rounds(twin, name):
    """More tokens than are laid out at a time."""
    columns = max(64, FORMATS[name].block)
    matrix, _ = weights(7, columns, name)
    x = RANDOM.standard_normal((413, columns)).astype(np.float32)
    whole = kernels.linear(x, matrix)
    for t in range(0, len(x), 3):
        assert np.array_equal(kernels.linear(x[t : t + 1], matrix)[0], whole[t])


def in_cache(values, name):
    """values (G, n, w) -> (them in a cache of this number format, what they are there)."""
    raw = FORMATS[name].encode(values.astype(np.float32))
    return raw.view(ELEMENTS[name]), FORMATS[name].decode(raw).astype(float)


@pytest.mark.parametrize("name", KV_DTYPES)
@pytest.mark.parametrize(
    "groups, window, biased, cap, sinking",
    [(6, None, False, 0, False), (2, None, True, 0, True), (1, 5, True, 0, False),
     (3, None, True, 2, False),
     (2, 5, False, 0, True)],
)  # fmt: skip
def test_attention(twin, name, groups, window, biased, cap, sinking):
    heads, context, width, start, n = 6, 50, 64, 9, 12
    keys, exact_keys = in_cache(RANDOM.standard_normal((groups, context, width)), name)
    values, exact_values = in_cache(RANDOM.standard_normal((groups, context, width)), name)
    q = RANDOM.standard_normal((n, heads, width)).astype(np.float32)
    bias = RANDOM.standard_normal((heads, context)).astype(np.float32) if biased else None
    sinks = np.linspace(-20, 60, heads, dtype=np.float32) if sinking else None
    found = kernels.attention(q, keys, values, start, window, bias, cap, sinks)
    for t in range(n):
        seen = slice(max(0, start + t + 1 - window) if window else 0, start + t + 1)
        for head in range(heads):
            group = head // (heads // groups)
            scores = exact_keys[group, seen] @ q[t, head].astype(float)
            scores = cap * np.tanh(scores / cap) if cap else scores
            scores += bias[head, seen] if biased else 0
            sink = [sinks[head]] if sinking else []  # one more score, and no value
            weights = np.exp([*scores, *sink] - np.max([*scores, *sink]))
            expected = (weights / weights.sum())[: len(scores)] @ exact_values[group, seen]
            np.testing.assert_allclose(found[t, head], expected, atol=1e-5)
        alone = kernels.attention(q[t : t + 1], keys, values, start + t, window, bias, cap, sinks)
        assert np.array_equal(alone[0], found[t])


@pytest.mark.parametrize("unit", ["", "plain", "avx2", "avx512", "avx512vnni"])
def test_scores_of_blocks_are_those_of_their_values(unit):
    """Attention over q8_0 has the bits of attention over what it decodes to: one order of sums,
    and no query of 8 bits."""
    if "native" not in kernels.TWINS:
        pytest.skip("the compiled kernels are not here")
    code = """if True:
        import numpy as np
        from flashinfer import kernels
        from flashinfer.formats.number_formats import FORMATS
        random = np.random.default_rng(5)
        q = random.standard_normal((9, 6, 96)).astype(np.float32)
        x = random.standard_normal((2, 3, 40, 96)).astype(np.float32)
        raw = FORMATS["q8_0"].encode(x)
        found = kernels.attention(q, *raw, 31)
        assert np.array_equal(found, kernels.attention(q, *FORMATS["q8_0"].decode(raw), 31))
    """
    environment = {**os.environ, "FLASHINFER_VECTOR_UNIT": unit, "FLASHINFER_KERNELS": "native"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("name", KV_DTYPES)
@pytest.mark.parametrize("width", [32, 96, 160, 256])
@pytest.mark.parametrize("window", [None, 3, 70])
def test_tokens_that_meet_the_keys_together(twin, name, width, window):
    """Each query as by itself: more keys than a tile, and windows that tokens hardly share."""
    heads, groups, context, start = 4, 2, 150, 83
    random = np.random.default_rng(width)
    keys, _ = in_cache(random.standard_normal((groups, context, width)), name)
    values, _ = in_cache(random.standard_normal((groups, context, width)), name)
    q = random.standard_normal((20, heads, width)).astype(np.float32)
    bias = random.standard_normal((heads, context)).astype(np.float32)
    try:
        for first, options in ((0, (window,)), (start, (window, bias, 2.0))):
            alone = np.concatenate(
                [
                    kernels.attention(q[t : t + 1], keys, values, first + t, *options)
                    for t in range(len(q))
                ]
            )
            for threads in (1, 2, 3):
                kernels.set_threads(threads)
                for n in (5, 6, 7, 11, 12, 20):
                    found = kernels.attention(q[:n], keys, values, first, *options)
                    assert np.array_equal(found, alone[:n])
    finally:
        kernels.set_threads(1)


@pytest.mark.parametrize("name", KV_DTYPES)
@pytest.mark.parametrize("n", [1, 5, 6, 20])
def test_attention_in_both_directions(twin, name, n):
    """Each token sees all: as the last one of a causal pass does, to the bit."""
    heads, groups, context, width, start = 4, 2, 40, 64, 7
    keys, _ = in_cache(RANDOM.standard_normal((groups, context, width)), name)
    values, _ = in_cache(RANDOM.standard_normal((groups, context, width)), name)
    q = RANDOM.standard_normal((n, heads, width)).astype(np.float32)
    sinks = RANDOM.standard_normal(heads).astype(np.float32)
    bias = RANDOM.standard_normal((heads, context)).astype(np.float32)
    try:
        for options in ((None,), (bias, 2.0, sinks)):
            last = np.concatenate(
                [
                    kernels.attention(q[t : t + 1], keys, values, start + n - 1, None, *options)
                    for t in range(n)
                ]
            )
            for threads in (1, 3):
                kernels.set_threads(threads)
                found = kernels.attention(q, keys, values, start, None, *options, both=True)
                assert np.array_equal(found, last)
    finally:
        kernels.set_threads(1)
    for wrong in ({"both": 1}, {"both": None}, {"both": True, "window": 3}):
        with pytest.raises(ValueError, match="both"):
            kernels.attention(q, keys, values, start, **wrong)


def test_attention_with_large_scores(twin):
    """Differences beyond the range of exp give weights of 0 and 1, not NaN."""
    keys = np.zeros((1, 4, 32), dtype=np.float32)
    keys[0, 2] = 100
    values = np.arange(4, dtype=np.float32).reshape(1, 4, 1) * np.ones(32, dtype=np.float32)
    q = np.full((1, 1, 32), 100, dtype=np.float32)
    assert np.array_equal(kernels.attention(q, keys, values, 3)[0, 0], np.full(32, 2.0))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(
    ("groups", "heads", "n", "width"), [(1, 1, 1, 1), (2, 6, 9, 5), (2, 4, 16, 32), (1, 3, 40, 70)]
)
def test_linear_attention(twin, groups, heads, n, width, delta):
    """As its definition says in float64; and however many tokens there are at a time."""
    random, tokens = np.random.default_rng(8), 7
    q, k = (random.standard_normal((tokens, groups, n), dtype=np.float32) / n**0.5 for _ in "qk")
    v = random.standard_normal((tokens, heads, width), dtype=np.float32)
    decay, rate = (random.random((tokens, heads), dtype=np.float32) for _ in range(2))
    state = random.standard_normal((heads, n, width), dtype=np.float32)
    q, k = (x.astype(np.float32) for x in (q, k))
    exact, expected = state.astype(np.float64), np.empty(v.shape)
    for t in range(tokens):
        for h in range(heads):
            key, query = (x[t, h * groups // heads].astype(np.float64) for x in (k, q))
            exact[h] *= decay[t, h]
            brought = v[t, h] - key @ exact[h] if delta else v[t, h]
            exact[h] += np.outer(key, rate[t, h] * brought)
            expected[t, h] = query @ exact[h]
    after = state.copy()
    found = kernels.linear_attention(q, k, v, decay, rate, after, delta)
    assert np.abs(found - expected).max() < 1e-5 and np.abs(after - exact).max() < 1e-5
    for sizes in ([1] * 7, [3, 4], [6, 1]):
        again, done, parts = state.copy(), 0, []
        for size in sizes:
            some = slice(done, done + size)
            parts.append(kernels.linear_attention(
                q[some], k[some], v[some], decay[some], rate[some], again, delta))  # fmt: skip
            done += size
        assert np.array_equal(np.concatenate(parts), found) and np.array_equal(again, after)


def test_wrong_shapes_are_refused_before_a_pointer_is_touched():
    if "native" not in kernels.TWINS:
        pytest.skip("the compiled kernels are not here")
    native = kernels.TWINS["native"]
    memory, starts, format, _ = scattered(5, 32, "f16")
    x = np.zeros((2, 32), dtype=np.float32)
    a = np.zeros((5, 2), dtype=np.float32)
    up, down = native["sparse_up"], native["sparse_down"]
    indptr, tokens = np.array([0, 1, 1, 1, 1, 2], np.int32), np.array([0, 1], np.int32)
    for call in (
        lambda: up(memory, starts + len(memory), format, x),
        lambda: up(memory, starts - len(memory), format, x),
        lambda: up(memory, starts, format, x, np.zeros(4, np.float32)),
        lambda: up(memory, starts, format, x, None, indptr[:-1], tokens),
        lambda: up(memory, starts, format, x, None, indptr[::-1].copy(), tokens),
        lambda: up(memory, starts, format, x, None, indptr, tokens + 1),
        lambda: down(memory, starts, format, a[:4], x),
        lambda: native["linear"](x, kernels.Matrix(memory[:64].reshape(2, 32), 16, format)),
        lambda: native["attention"](x[None], np.zeros((2, 4, 32)), np.zeros((2, 4, 32)), 0),
        lambda: native["attention"](
            x[None], np.zeros((2, 4, 32), np.float32), np.zeros((2, 4, 32), np.float32), 4
        ),
        lambda: native["attention"](
            x[None],
            np.zeros((2, 4, 32), np.float32),
            np.zeros((2, 4, 32), np.float32),
            0,
            0,
            np.zeros((2, 3), np.float32),
        ),
        lambda: native["rms_norm"](x, np.zeros(31, np.float32), 1e-5),
        lambda: native["rotate"](x[None], *np.zeros((2, 1, 17), np.float32)),
        lambda: native["rotate"](x[None], *np.zeros((2, 2, 16), np.float32)),
        lambda: native["activate"](x[:, ::2], "relu"),
    ):
        with pytest.raises(ValueError):
            call()


RUN = """
import sys, numpy as np
from flashinfer import Model, kernels
from flashinfer.formats.convert import convert
convert({source!r}, {target!r}, "f16")
with Model.open({target!r}) as model:
    print(kernels.describe(), model.logits(range(3, 43)).tobytes().hex())
"""


def test_every_vector_unit_gives_the_same_bits(tmp_path):
    """The portable C and each vector unit that this CPU has."""
    found = {}
    for unit in ("plain", "avx2", "avx512", "avx512vnni", "neon", "neon_dotprod"):
        code = RUN.format(source=str(DATA / "opt-plain"), target=str(tmp_path / "x.flash"))
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "FLASHINFER_VECTOR_UNIT": unit},
        )  # fmt: skip
        kernel, logits = run.stdout.rsplit(" ", 1)
        found[kernel] = logits
    assert len(set(found.values())) == 1, found.keys()


@pytest.mark.parametrize("d", [1, 31, 64, 100, 2048])
def test_rms_norm(twin, d):
    x = (RANDOM.standard_normal((5, d)) * 3 + 1).astype(np.float32)
    weight = RANDOM.standard_normal(d).astype(np.float32)
    exact = x / np.sqrt(np.square(x.astype(float)).mean(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(kernels.rms_norm(x, None, 1e-5), exact, atol=1e-5)
    found = kernels.rms_norm(x, weight, 1e-5)
    np.testing.assert_allclose(found, exact * weight, atol=3e-5)
    for t in range(5):
        assert np.array_equal(kernels.rms_norm(x[t : t + 1], weight, 1e-5)[0], found[t])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_remember(twin, dtype):
    """Every float16, what lies halfway between two, and the neighbours of that."""
    with np.errstate(all="ignore"):  # signalling NaNs; what is infinite in float16
        x = values_around_halves()
        expected = x.transpose(1, 0, 2).astype(dtype)
    cache = np.full((2, len(x) + 5, 32), 7, dtype=dtype)
    kernels.remember(cache, x, 3)
    found = cache[:, 3 : 3 + len(x), :15].copy()
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(
        np.signbit(found[~np.isnan(found)]), np.signbit(expected[~np.isnan(found)])
    )
    cache[:, 3 : 3 + len(x), :15] = 7
    assert (cache == 7).all()
    for wrong in ((cache, x, 6), (cache, x, -1), (cache[:1], x, 0), (cache[..., :9], x, 0)):
        with pytest.raises(ValueError):
            kernels.remember(*wrong)


@pytest.mark.parametrize("width", [15, 32, 64, 80])
def test_remember_in_blocks(twin, width):
    """As q8_0 encodes weights; the rest of the last block is zeros, and no other block written."""
    x = (RANDOM.standard_normal((9, 3, width)) * 10.0 ** RANDOM.integers(-9, 7, (9, 3, 1))).astype(
        np.float32
    )
    x[2, 1] = 0
    cache = np.full((3, 20, 34 * 4), 7, dtype=np.uint8)
    kernels.remember(cache, x, 5)
    padded = np.pad(x, ((0, 0), (0, 0), (0, -width % 32))).transpose(1, 0, 2)
    expected = FORMATS["q8_0"].encode(padded)
    assert np.array_equal(cache[:, 5:14, : expected.shape[2]], expected)
    cache[:, 5:14, : expected.shape[2]] = 7
    assert (cache == 7).all()
    for wrong in ((cache, x, 12), (cache[:, :, :-1].copy(), x, 0), (cache[..., :34].copy(), x, 0)):
        if wrong[0].shape[2] == 34 and width <= 32:
            continue
        with pytest.raises(ValueError):
            kernels.remember(*wrong)


def test_blocks_of_what_q8_0_cannot_hold(twin):
    """A NaN is one of all its block, what is beyond the scale's range becomes infinite, and what
    is too small becomes 0; nothing else changes."""
    x = RANDOM.standard_normal((1, 1, 160)).astype(np.float32)
    x[0, 0, [3, 40, 70]] = np.nan, np.inf, 1e30
    x[0, 0, 96:128] = 1e-44, *np.full(31, -1e-40)
    cache = np.zeros((1, 1, 34 * 5), dtype=np.uint8)
    kernels.remember(cache, x, 0)
    with np.errstate(invalid="ignore"):  # an infinite scale of zeros
        found = widened(cache)[0, 0]
    assert np.isnan(found[:32]).all()
    assert np.isnan(found[32:64]).all()  # whose scale is infinite, and whose numbers are 0
    assert found[70] == np.inf and not np.isfinite(found[64:96]).any()
    assert np.array_equal(found[96:128], np.zeros(32))
    np.testing.assert_allclose(found[128:], x[0, 0, 128:], atol=0.02)


def values_around_halves():
    """(T, 2, 15) float32."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    between = (finite[:-1] + finite[1:]) / 2
    x = np.concatenate([halves, between, np.nextafter(between, np.inf, dtype=np.float32),
                        np.nextafter(between, -np.inf, dtype=np.float32),
                        np.float32([65519.99, 65520, 65536, 1e9, -1e9, 1e-30])])  # fmt: skip
    return np.resize(x, (len(x) // 30 + 1) * 30).reshape(-1, 2, 15)


def test_positive(twin):
    for scores in (RANDOM.standard_normal(99), np.full(5, 1.0), np.full(5, -1.0), np.zeros(0),
                   np.array([np.nan, -0.0, 0.0, np.inf, 1e-45, -np.inf])):  # fmt: skip
        found = kernels.positive(scores.astype(np.float32))
        assert found.dtype == np.int32
        assert found.tolist() == [i for i, score in enumerate(scores) if score > 0]


def test_rotate(twin):
    """As multiplying pairs, taken as complex numbers, with e^(i angle); the rest stays."""
    x = RANDOM.standard_normal((3, 2, 20)).astype(np.float32)
    angles = RANDOM.uniform(-9, 9, (3, 8))
    found = x.copy()
    kernels.rotate(found, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    turned = (x[..., :8] + 1j * x[..., 8:16]) * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(found[..., :8], turned.real, atol=1e-5)
    np.testing.assert_allclose(found[..., 8:16], turned.imag, atol=1e-5)
    assert np.array_equal(found[..., 16:], x[..., 16:])


EXACT = {
    "relu": lambda x: np.where(x > 0.3, x, 0),
    "relu2": lambda x: np.where(x > 0.3, x * x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * [0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x],
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "cap": lambda x: 0.3 * np.tanh(x / 0.3),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activate(twin, kind):
    x = np.concatenate([np.linspace(-30, 30, 5000), [0, -0.0, 80, -80]]).astype(np.float32)
    found = x.copy()
    kernels.activate(found, kind, 0.3)
    np.testing.assert_allclose(found, EXACT[kind](x.astype(float)), rtol=2e-6, atol=2e-6)
    square = x[:4900].reshape(70, 70).copy()
    kernels.activate(square, kind, 0.3)
    assert np.array_equal(square.reshape(-1), found[:4900])


@pytest.mark.parametrize("cap", [1.0, 50.0, 1000.0])
def test_a_large_cap_leaves_small_values_their_digits(twin, cap):
    x = np.concatenate([np.geomspace(1e-6, 5e3, 4000), -np.geomspace(1e-6, 5e3, 4000)])
    x = x.astype(np.float32)
    found = x.copy()
    kernels.activate(found, "cap", cap)
    np.testing.assert_allclose(found, cap * np.tanh(x.astype(float) / cap), rtol=2e-6)
    assert np.abs(found).max() <= cap and (np.diff(found[:4000]) >= 0).all()


def test_kernels_know_what_models_may_ask_for():
    assert set(ffn.ACTIVATIONS) <= set(ACTIVATIONS)


@pytest.mark.skipif("native" not in kernels.TWINS, reason="no compiled kernels")
@pytest.mark.parametrize("table", ["number_formats.FORMATS", "activations.ACTIVATIONS"])
def test_compiled_kernels_of_another_version_are_refused(table):
    """A module that was built from other tables is no twin; it is not used with wrong codes."""
    code = f"""
import importlib
from flashinfer import kernels
from flashinfer.formats import number_formats
from flashinfer.kernels import activations
{table}['another'] = next(iter({table}.values()))
importlib.reload(kernels)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "was built from another version of flashinfer; install it again" in run.stderr


@pytest.mark.parametrize("d", [1, 31, 64, 100, 2048])
def test_layer_norm(twin, d):
    x = (RANDOM.standard_normal((5, d)) * 3 + 1).astype(np.float32)
    weight, bias = RANDOM.standard_normal((2, d)).astype(np.float32)
    exact = x.astype(float)
    exact = exact - exact.mean(axis=1, keepdims=True)
    exact /= np.sqrt(np.square(exact).mean(axis=1, keepdims=True) + 1e-5)
    plain = kernels.layer_norm(x, None, None, 1e-5)
    np.testing.assert_allclose(plain, exact, atol=1e-5)
    found = kernels.layer_norm(x, weight, bias, 1e-5)
    np.testing.assert_allclose(found, exact * weight + bias, atol=3e-5)
    for t in range(5):
        assert np.array_equal(kernels.layer_norm(x[t : t + 1], weight, bias, 1e-5)[0], found[t])


def test_copy_rows(twin):
    source = RANDOM.integers(0, 256, 5000, dtype=np.uint8)
    starts, lengths = np.array([0, 4000, 700, 9]), np.array([700, 1000, 1, 0])
    places, target = np.array([300, 1100, 0, 50]), np.zeros(2200, np.uint8)
    kernels.copy_rows(source, starts, target, places, lengths)
    expected = np.zeros(2200, np.uint8)
    expected[300:1000], expected[1100:2100], expected[0] = source[:700], source[4000:], source[700]
    assert np.array_equal(target, expected)
    if twin == "native":
        for wrong in (-1, 1300):
            with pytest.raises(ValueError, match="row 1 of 1000 bytes does not fit"):
                kernels.copy_rows(source, starts, target, places + [0, wrong - 1100, 0, 0], lengths)


@settings(deadline=None)
@given(st.data())
def test_reads_are_merged_like_by_its_twin(data):
    """Both twins do the same, and what is promised of the reads holds."""
    n, unit = data.draw(st.integers(0, 12)), 4
    gaps = data.draw(st.lists(st.integers(-2, 6), min_size=n, max_size=n))
    lengths = np.array(data.draw(st.lists(st.integers(1, 5), min_size=n, max_size=n)), np.int64)
    steps = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    ends = np.cumsum(lengths + np.array(gaps, np.int64) + 2)
    offsets, lengths = (ends - lengths) * unit, lengths * unit
    destinations = np.cumsum(lengths + np.array(steps, np.int64) * unit) - lengths
    gap, most, room = (data.draw(st.integers(0, top)) * unit for top in (5, 30, 40))
    if data.draw(st.booleans()):
        most = room = 1000
    results = [
        twin["merge_reads"](offsets, lengths, destinations, gap, most, room)
        for twin in kernels.TWINS.values()
    ]
    for found in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found, results[0], strict=True))
    straight, staged, copies = results[0]
    file = RANDOM.integers(0, 256, 1000, dtype=np.uint8)
    memory, expected = np.zeros((2, 1000), dtype=np.uint8)
    staging, covered = np.zeros(room, dtype=np.uint8), np.zeros(room, dtype=int)
    for offset, length, place in straight.T:
        memory[place : place + length] = file[offset : offset + length]
    for offset, length, place in staged.T:
        staging[place : place + length] = file[offset : offset + length]
        covered[place : place + length] += 1
    assert covered.sum() == staged[1].sum() and covered.max(initial=0) <= 1  # each has its place
    for place, source, length in copies.T:
        memory[place : place + length] = staging[source : source + length]
    for offset, length, place in zip(offsets, lengths, destinations, strict=True):
        expected[place : place + length] = file[offset : offset + length]
    assert np.array_equal(memory, expected)  # every row is there, and nothing else was written to
    reads = np.concatenate([straight[:2], staged[:2]], axis=1)
    reads = reads[:, reads[0].argsort()]
    assert reads[1].max(initial=0) <= max(most, lengths.max(initial=0))
    if room >= 1000 and most >= 1000:  # then all that is near is joined
        assert (reads[0, 1:] - reads[0, :-1] - reads[1, :-1] > gap).all()


@settings(deadline=None)
@given(st.data())
def test_place_keeps_the_books_like_its_twin(data):
    """Random tokens: both twins do the same, and every promise of place() holds."""
    neurons = data.draw(st.integers(1, 24))
    capacity = data.draw(st.integers(1, neurons))
    window = data.draw(st.integers(1, 6) | st.just(1 << 60))
    states = {
        name: {
            "slot_of": np.full(neurons, -1, np.int32),
            "neuron_at": np.full(capacity, -1, np.int32),
            "last_used": np.zeros(capacity, np.int64),
            "used": 0,
            "rows": np.full(capacity, -1),  # what each row's bytes would be
        }
        for name in kernels.TWINS
    }
    priority = np.array(data.draw(st.lists(st.integers(0, 9), min_size=neurons, max_size=neurons)))
    priority, history, fits = priority.astype(float), [], True
    waves = data.draw(st.lists(st.booleans(), min_size=1, max_size=12))
    for token in np.cumsum(waves).tolist():  # False: another wave of the same token
        wanted = np.array(
            sorted(data.draw(st.sets(st.integers(0, neurons - 1), max_size=capacity))), np.int32
        )
        history.append((token, set(wanted.tolist())))
        recent = set().union(*(used for when, used in history if when > token - window))
        fits &= len(recent) <= capacity
        results = []
        for name, s in states.items():
            before = s["slot_of"].copy()
            slots, misses, moved_from, moved_to, s["used"] = kernels.TWINS[name]["place"](
                wanted, token, window, s["slot_of"], s["neuron_at"], s["last_used"], priority,
                s["used"],
            )  # fmt: skip
            assert np.array_equal(misses, np.flatnonzero(before[wanted] < 0))
            s["rows"][moved_to] = s["rows"][moved_from]
            s["rows"][slots[misses]] = wanted[misses]
            assert np.array_equal(s["rows"][slots], wanted)  # the right bytes are there
            held = s["neuron_at"][: s["used"]]
            assert np.array_equal(s["rows"][: s["used"]], held)
            assert (s["neuron_at"][s["used"] :] == -1).all()
            assert set(np.flatnonzero(s["slot_of"] >= 0)) == set(held.tolist())
            assert np.array_equal(s["slot_of"][held], np.arange(s["used"]))
            assert set(wanted.tolist()) <= set(held.tolist()) <= recent
            left = [n for n in np.flatnonzero(before >= 0) if n in recent and n not in held]
            stayed = [n for n in held if before[n] >= 0 and n not in wanted]
            assert not left or not stayed or max(priority[left]) <= min(priority[stayed])
            if fits:
                assert set(held.tolist()) == recent  # exactly the paper's window
            results.append((slots.tolist(), moved_from.tolist(), moved_to.tolist(), held.tolist()))
        assert all(result == results[0] for result in results)


def test_place_refuses_more_than_fits(twin):
    state = (
        np.full(4, -1, np.int32),
        np.full(2, -1, np.int32),
        np.zeros(2, np.int64),
        np.zeros(4),
        0,
    )
    with pytest.raises(ValueError, match="3 neurons do not fit"):
        kernels.place(np.arange(3, dtype=np.int32), 0, 5, *state)
