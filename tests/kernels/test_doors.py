"""Wrong arguments of every kernel: both twins refuse the same ones, in the same words.

A sound call is made, one of its arguments is spoilt, and the twins must agree: both raise the same
error, or both take it and give nearly the same.
"""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer import kernels
from flashinfer.formats.number_formats import FORMATS, NumberFormat
from flashinfer.kernels.activations import ACTIVATIONS
from flashinfer.kernels.doors import GROUP_SCORES, SCORINGS
from flashinfer.transformer.kv_cache import ELEMENTS, KV_DTYPES

if "native" not in kernels.TWINS:
    pytest.skip("the compiled kernels are not here", allow_module_level=True)

SIZES = st.integers(0, 5)
try:  # io_uring where the kernel has it, else threads
    kernels.TWINS["native"]["Reader"](0)
    RING = 0
except OSError:
    RING = 2


class Unknown(NumberFormat):
    name, block, block_bytes = "unknown", 1, 1


def floats(random, *shape):
    return random.standard_normal(shape).astype(np.float32)


def weights(draw, random, rows):
    """(memory, starts, format, columns) of rows of any format, at any bytes."""
    format = draw(st.sampled_from(list(FORMATS.values())))
    columns = draw(st.integers(0, 3)) * max(32, format.block)
    columns += draw(SIZES) if format.block == 1 else 0
    width = format.row_bytes(columns)
    raw = format.encode(floats(random, rows, columns))
    gap = draw(st.integers(0, 3))
    memory = np.full(rows * (width + gap) + draw(SIZES), 7, dtype=np.uint8)
    starts = random.permutation(rows).astype(np.int64) * (width + gap)
    for row, start in zip(raw, starts, strict=True):
        memory[start : start + width] = row
    return memory, starts, format, columns


def pairs(draw, random, rows, n_tokens):
    """(indptr, tokens), or None for both."""
    if draw(st.booleans()):
        return None, None
    mask = random.random((rows, n_tokens)) < 0.5
    indptr = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32)
    return indptr, np.nonzero(mask)[1].astype(np.int32)


def maybe(draw, value):
    return value if draw(st.booleans()) else None


def linear(draw, random):
    n, t = draw(SIZES), draw(SIZES)
    memory, _, format, columns = weights(draw, random, n)
    width = format.row_bytes(columns)
    data = np.ascontiguousarray(memory[: n * width]).reshape(n, width)
    return [floats(random, t, columns), kernels.Matrix(data, columns, format),
            maybe(draw, floats(random, n)), draw(st.booleans())]  # fmt: skip


def sparse_up(draw, random):
    n, t = draw(SIZES), draw(SIZES)
    memory, starts, format, columns = weights(draw, random, n)
    x, bias = floats(random, t, columns), maybe(draw, floats(random, n))
    return [memory, starts, format, x, bias, *pairs(draw, random, n, t), draw(st.booleans())]


def sparse_down(draw, random):
    n, t = draw(SIZES), draw(SIZES)
    memory, starts, format, columns = weights(draw, random, n)
    indptr, tokens = pairs(draw, random, n, t)
    a = floats(random, n, t) if indptr is None else floats(random, len(tokens))
    return [memory, starts, format, a, floats(random, t, columns), indptr, tokens]


def attention(draw, random):
    groups, each, t, start = draw(st.integers(1, 3)), draw(SIZES), draw(SIZES), draw(SIZES)
    context, width = start + t + draw(SIZES), 32 * draw(st.integers(0, 2))
    name = draw(st.sampled_from(KV_DTYPES))
    keys, values = (
        FORMATS[name].encode(floats(random, groups, context, width)).view(ELEMENTS[name])
        for _ in range(2)
    )
    heads, window = groups * each, maybe(draw, draw(SIZES) + 1)
    return [floats(random, t, heads, width), keys, values, start, window,
            maybe(draw, floats(random, heads, context)), draw(st.sampled_from([0.0, 3.0])),
            maybe(draw, floats(random, heads)), window is None and draw(st.booleans())]  # fmt: skip


def linear_attention(draw, random):
    groups, each, t, n, width = draw(st.integers(1, 3)), *(draw(SIZES) for _ in range(4))
    heads = groups * each
    q, k = (floats(random, t, groups, n) for _ in range(2))
    decay, rate = (floats(random, t, heads) for _ in range(2))
    return [q, k, floats(random, t, heads, width), decay, rate,
            floats(random, heads, n, width), draw(st.booleans())]  # fmt: skip


def remember(draw, random):
    t, groups, width, start = (draw(SIZES) for _ in range(4))
    name = draw(st.sampled_from(KV_DTYPES))
    row = 34 * (-(-width // 32) + draw(SIZES)) if name == "q8_0" else width + draw(SIZES)
    cache = np.zeros((groups, start + t + draw(SIZES), row), dtype=ELEMENTS[name])
    return [cache, floats(random, t, groups, width), start]


def rotate(draw, random):
    t, heads, half = (draw(SIZES) for _ in range(3))
    x = floats(random, t, heads, 2 * half + draw(SIZES))
    return [x, floats(random, t, half), floats(random, t, half)]


def activate(draw, random):
    shape = draw(st.lists(SIZES, max_size=3))
    kind = draw(st.sampled_from(list(ACTIVATIONS)))
    return [np.asarray(floats(random, *shape), dtype=np.float32), kind, 0.5]


def layer_norm(draw, random):
    t, d = draw(SIZES), draw(SIZES)
    weight, bias = draw(st.sampled_from([(None, None), (floats(random, d), floats(random, d))]))
    return [floats(random, t, d), weight, bias, 1e-5]


def rms_norm(draw, random):
    t, d = draw(SIZES), draw(SIZES)
    return [floats(random, t, d), maybe(draw, floats(random, d)), 1e-5]


def positive(draw, random):
    return [floats(random, draw(SIZES))]


def route(draw, random):
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kept, experts = draw(st.integers(1, groups)), groups * size
    same = random.integers(0, experts, experts)  # experts that are equal in all
    logits, bias = floats(random, draw(SIZES), experts)[:, same], floats(random, experts)[same]
    scoring, group_by = (draw(st.sampled_from(words)) for words in (SCORINGS, GROUP_SCORES))
    return [np.ascontiguousarray(logits), draw(st.integers(1, kept * size)), draw(st.booleans()),
            scoring, maybe(draw, bias), groups, kept, draw(st.sampled_from([1.0, 2.5, -1])),
            group_by]  # fmt: skip


def place(draw, random):
    neurons = draw(st.integers(1, 8))
    capacity = draw(st.integers(0, neurons))
    used = draw(st.integers(0, capacity))
    held = random.permutation(neurons)[:used].astype(np.int32)
    neuron_at, slot_of = np.full(capacity, -1, np.int32), np.full(neurons, -1, np.int32)
    neuron_at[:used], slot_of[held] = held, np.arange(used)
    wanted = np.sort(random.permutation(neurons)[: draw(st.integers(0, capacity))])
    uses = random.integers(0, 9, capacity)
    return [wanted.astype(np.int32), 9, draw(st.integers(1, 12)), slot_of, neuron_at, uses,
            random.random(neurons), used]  # fmt: skip


def merge_reads(draw, random):
    n = draw(SIZES)
    lengths = random.integers(1, 9, n)
    offsets = np.cumsum(lengths + random.integers(0, 3, n))
    return [offsets, lengths, random.permutation(n) * 9, draw(SIZES), 30, draw(st.integers(0, 40))]


def copy_rows(draw, random):
    n = draw(SIZES)
    lengths = random.integers(0, 9, n)
    source, target = random.integers(0, 256, (2, 100), dtype=np.uint8)
    return [source, random.integers(0, 90, n), target, np.arange(n) * 9, lengths]


def submit(draw, random):
    n = draw(SIZES)
    memory = np.zeros(100, dtype=np.uint8)
    end = draw(st.integers(0, 60))
    return [end, random.integers(0, 50, n), random.integers(0, 9, n), memory, np.arange(n) * 9]


CALLS = (linear, sparse_up, sparse_down, attention, linear_attention, remember, rotate, activate,
         layer_norm, rms_norm, positive, route, place, merge_reads, copy_rows, submit)  # fmt: skip


def spoilt(draw, random, value):
    """The same argument, wrong in one way (or, by chance, still right)."""
    if isinstance(value, kernels.Matrix):
        part = draw(st.sampled_from(["data", "columns", "format"]))
        parts = {name: getattr(value, name) for name in ("data", "columns", "format")}
        return kernels.Matrix(**{**parts, part: spoilt(draw, random, parts[part])})
    if isinstance(value, NumberFormat):
        return draw(st.sampled_from([*FORMATS.values(), Unknown(), "f16", None]))
    if isinstance(value, np.ndarray) and draw(st.booleans()):
        return spoilt_values(draw, random, value)
    if isinstance(value, np.ndarray):
        return spoilt_array(draw, value)
    return draw(st.sampled_from([
        None, True, -1, 0, 1, 2, 3, 7, 10**6, 1 << 62, 1 << 63, -(1 << 63), 1 << 70, 10**400, 2.5,
        -0.0, 1e-300, 1e-4, 999.9, 1e4, 1e300, float("nan"), float("inf"), "relu", "mish", b"relu",
        "sigmoid", "max",
        [1], np.int64(2), np.float32(1), np.zeros(2, np.float32), {},
    ]))  # fmt: skip


def overlapping(draw, arguments, which):
    """Another of the arrays in its place, or one that begins within it, of the same dtype."""
    others = [a for i, a in enumerate(arguments) if i != which and isinstance(a, np.ndarray)]
    value = arguments[which]
    if not others or not isinstance(value, np.ndarray):
        return value
    raw = draw(st.sampled_from(others)).reshape(-1).view(np.uint8)
    skip = draw(st.integers(0, 2)) * value.itemsize
    if len(raw) < skip + value.nbytes:
        return value
    return raw[skip : skip + value.nbytes].view(value.dtype).reshape(value.shape)


def spoilt_array(draw, value):
    """Another dtype, shape, order or kind of object."""
    how = draw(st.integers(0, 11))
    if how == 0:
        names = ("f4", "f8", "f2", "i4", "i8", "u1", "u4", "i1", "?", ">f4", ">i4", "O", "c8")
        with np.errstate(all="ignore"):
            return value.astype(draw(st.sampled_from(names)))
    if how == 1:
        return None
    if how == 2:
        return value.tolist()
    if how == 3 and value.ndim:
        return value[..., ::-1]
    if how == 4 and value.ndim:
        return np.repeat(value, 2, axis=-1)[..., ::2]
    if how == 5:
        return np.asfortranarray(value)
    if how == 6:
        return value[None]
    if how == 7 and value.ndim:
        return value[1:]
    if how == 8:
        return value.reshape(-1)
    if how == 9:
        frozen = value.copy()
        frozen.flags.writeable = False
        return frozen
    if how == 10:  # at an odd byte
        raw = np.zeros(value.nbytes + 1, dtype=np.uint8)[1:]
        raw[:] = np.frombuffer(value.tobytes(), dtype=np.uint8)
        return raw.view(value.dtype).reshape(value.shape)
    return memoryview(np.ascontiguousarray(value))


def spoilt_values(draw, random, value):
    """One element out of range."""
    value = value.copy()
    if value.size and value.dtype != np.uint8:
        if value.dtype.kind == "f":
            wrong = draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38, 0.0, -1e-45]))
        else:
            info = np.iinfo(value.dtype)
            wrong = draw(st.sampled_from([info.min, info.max, info.max - 8, -1, 0, 1, 5, 99]))
        with np.errstate(all="ignore"):
            value.reshape(-1)[random.integers(value.size)] = wrong
    return value


def copied(arguments):
    """Copies of the arrays that a kernel may change, which share memory where these do."""
    copies, found = {}, []
    for a in arguments:
        plain = isinstance(a, np.ndarray) and not a.dtype.hasobject
        if plain and a.flags.c_contiguous and a.flags.writeable:
            base = a.base if isinstance(a.base, np.ndarray) and a.base.flags.c_contiguous else a
            copy = copies.setdefault(id(base), base.copy())
            skip = a.ctypes.data - base.ctypes.data
            raw = copy.reshape(-1).view(np.uint8)[skip : skip + a.nbytes]
            a = raw.view(a.dtype).reshape(a.shape)
        found.append(a)
    return found


def outcome(kernel, arguments):
    """(message of the ValueError, or what it returns and leaves in its arguments)"""
    arguments = copied(arguments)
    try:
        result = kernel(*arguments)
    except ValueError as error:
        return str(error), None
    result = result if isinstance(result, tuple) else (result,)
    return None, [np.asarray(v) for v in (*result, *arguments) if isinstance(v, (np.ndarray, int))]


def both(name, arguments):
    if name != "submit":
        return [outcome(twin[name], arguments) for twin in kernels.TWINS.values()]
    found = []
    with open(__file__, "rb") as file:
        for twin, threads in ((kernels.TWINS["numpy"], 2), (kernels.TWINS["native"], RING)):
            reader, fd = twin["Reader"](threads), file.fileno()

            def read(*arguments, reader=reader, fd=fd):
                try:
                    reader.submit(fd, *arguments).wait()
                except (OSError, EOFError):
                    pass  # beyond the file's end: what is checked here comes before

            found.append(outcome(read, arguments))
    return found


@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_twins_refuse_the_same(make, data):
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    arguments = make(data.draw, random)
    (message, values), (other, other_values) = both(make.__name__, arguments)
    assert message is None and other is None  # what is sound is taken, empty arrays as well
    agree(make, values, other_values)
    which = data.draw(st.integers(0, len(arguments) - 1))
    if data.draw(st.integers(0, 4)):
        arguments[which] = spoilt(data.draw, random, arguments[which])
    else:
        arguments[which] = overlapping(data.draw, arguments, which)
    (message, values), (other, other_values) = both(make.__name__, arguments)
    assert message == other
    assert message != ""  # a refusal that says nothing
    if message is None and make is not submit:  # reads to the same place come in any order
        agree(make, values, other_values)


def agree(make, values, others):
    for a, b in zip(values, others, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.dtype.kind != "f":
            assert np.array_equal(a, b)
            continue
        with np.errstate(invalid="ignore"):  # ARM says so where a signalling NaN is converted
            largest = np.abs(a.astype(float)).max(initial=0)
        if largest < 1e30:  # no NaN, nothing that overflows on the way
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 + 1e-4 * largest)


@pytest.mark.parametrize("name", kernels.TWINS)
def test_threads_and_readers_refuse_nonsense(name):
    """A number of threads, a file and threads to read it with."""
    twin, fd = kernels.TWINS[name], os.open(__file__, os.O_RDONLY)
    try:
        for wrong in (0, -1, 1025, 1 << 40, 2.0, None, "2"):
            with pytest.raises(ValueError, match="threads is"):
                kernels.set_threads(wrong)
        for wrong in (-1, 1025, 2.0, None, "2"):
            with pytest.raises(ValueError, match="threads is"):
                twin["Reader"](wrong)
        none, memory = np.zeros(0, dtype=np.int64), np.zeros(8, dtype=np.uint8)
        for wrong, word in (((-1, 0), "fd"), (("0", 0), "fd"), ((fd, -1), "end")):
            with pytest.raises(ValueError, match=f"{word} is"):
                twin["Reader"](1).submit(*wrong, none, none, memory, none)
    finally:
        os.close(fd)


def test_numpy_never_warns():
    """What overflows becomes infinite in silence, as in the compiled twins."""
    twin = kernels.TWINS["numpy"]
    big = np.full((2, 32), 3e38, dtype=np.float32)
    matrix = kernels.Matrix(FORMATS["f32"].encode(big), 32, FORMATS["f32"])
    assert np.isinf(twin["linear"](big, matrix)).all()
    cache = np.zeros((1, 2, 32), dtype=np.float16)
    twin["remember"](cache, big[:, None], 0)
    assert np.isinf(cache).all()
