import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashinfer.formats.errors import UserError
from flashinfer.formats.number_formats import FORMATS, number_format

floats = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1)


@given(floats)
def test_f32_is_exact(values):
    values = np.array(values, dtype=np.float32)
    assert np.array_equal(FORMATS["f32"].decode(FORMATS["f32"].encode(values)), values)


@given(st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1))
def test_f16_keeps_halves(values):
    values = np.array(values, dtype=np.float32)
    assert np.array_equal(FORMATS["f16"].decode(FORMATS["f16"].encode(values)), values)


@given(floats)
def test_bf16_rounds_to_nearest_even(values):
    values = np.array(values, dtype=np.float32)
    found = FORMATS["bf16"].decode(FORMATS["bf16"].encode(values))
    bits = values.view(np.uint32).astype(np.uint64)
    low = (bits >> 16 << 16).astype(np.uint32).view(np.float32)
    with np.errstate(over="ignore"):
        high = ((bits >> 16) + 1 << 16).astype(np.uint32).view(np.float32)
    beyond = np.copysign(
        2.0**128, values.astype(float)
    )  # the next step above the largest, which is infinite
    next_step = np.where(np.isinf(high), beyond, high.astype(float))
    down, up = np.abs(values.astype(float) - low), np.abs(next_step - values)
    even = (bits >> 16) % 2 == 0
    assert np.array_equal(found, np.where((down < up) | ((down == up) & even), low, high))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_stays_so_or_is_refused(name, value):
    values = np.random.default_rng(0).standard_normal((2, 512)).astype(np.float32)
    values[1, 300] = value
    with np.errstate(all="ignore"):
        try:
            found = FORMATS[name].decode(FORMATS[name].encode(values))
        except UserError as error:
            assert name == "mxfp4" and "finite" in str(error)
            return
    assert np.isfinite(found[0]).all() and not np.isfinite(found[1, 300])


def test_bf16_keeps_infinities_and_nans():
    values = np.array([np.inf, -np.inf, np.nan], dtype=np.float32)
    found = FORMATS["bf16"].decode(FORMATS["bf16"].encode(values))
    assert np.array_equal(found, values, equal_nan=True)
    signalling = np.array([0x7F800001], dtype=np.uint32).view(np.float32)
    assert np.isnan(FORMATS["bf16"].decode(FORMATS["bf16"].encode(signalling))[0])


def test_f16_refuses_what_it_cannot_hold():
    with pytest.raises(UserError, match="bf16"):
        FORMATS["f16"].encode(np.array([1e6], dtype=np.float32))


BLOCKED = [name for name, format in FORMATS.items() if format.block > 1]
# Those that the gguf package has an encoder of; that of the others searches for better scales.
ENCODED = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "tq1_0", "tq2_0", "mxfp4")

TERNARY = ("tq1_0", "tq2_0")


def ggml(name):
    """(the gguf package's functions, its name of a format)."""
    quants = pytest.importorskip("gguf.quants")
    return quants, quants.GGMLQuantizationType[name.upper()]


def some_values(random):
    """Rows of several magnitudes, with zeros and a largest value of either sign."""
    values = random.standard_normal((40, 768)).astype(np.float32)
    values *= 10 ** random.uniform(-3, 3, (40, 1)).astype(np.float32)
    values[3, :32] = 0
    values[4, 5] = -values[4, :32].max() * 3
    return values


@pytest.mark.parametrize("name", BLOCKED)
def test_any_bytes_are_ggmls_values(name):
    """Every value bit for bit as the gguf package decodes it, whatever the bytes."""
    quants, kind = ggml(name)
    format = FORMATS[name]
    raw = np.random.default_rng(6).integers(0, 256, (500, 4 * format.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        found, expected = format.decode(raw), quants.dequantize(raw, kind)
    numbers = ~np.isnan(expected)
    assert numbers.mean() > 0.9 and np.array_equal(np.isnan(found), ~numbers)
    assert np.array_equal(found.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])


@pytest.mark.parametrize("name", ENCODED)
def test_blocks_are_ggmls(name):
    """Bit for bit what the gguf package writes."""
    quants, kind = ggml(name)
    values = some_values(np.random.default_rng(4))
    assert np.array_equal(FORMATS[name].encode(values), quants.quantize(values, kind))


@given(st.integers(0, 2**32 - 1), st.floats(0, 6e4, width=16))
def test_ternary_values_are_kept(seed, scale):
    """-1, 0 and 1 times a float16 lose nothing in the ternary formats."""
    values = np.random.default_rng(seed).integers(-1, 2, (3, 512)).astype(np.float32)
    values *= np.float32(scale)
    for format in (FORMATS[name] for name in TERNARY):
        assert np.array_equal(format.decode(format.encode(values)), values)


@pytest.mark.parametrize("name", [name for name in BLOCKED if name not in TERNARY])
def test_encoding_is_near_and_settles(name):
    """What was encoded is near, by its bits; and encoding it again gives nearly the same, since
    the scales, too, are rounded."""
    format, values = FORMATS[name], some_values(np.random.default_rng(5))
    found = format.decode(format.encode(values))
    again = format.decode(format.encode(found))
    size = np.linalg.norm(values, axis=1)
    bits = 8 * format.block_bytes / format.block
    assert (np.linalg.norm(found - values, axis=1) <= 3 * 2.0**-bits * size).all()
    assert (np.linalg.norm(again - found, axis=1) <= 2.0**-bits * size).all()
    assert format.encode(values[:0]).shape == (0, format.row_bytes(768))
    assert format.decode(format.encode(values[:0])).shape == (0, 768)


@pytest.mark.parametrize("name", FORMATS)
def test_any_layout_of_values_gives_bytes_in_order(name):
    values = some_values(np.random.default_rng(7))
    found = FORMATS[name].encode(np.asfortranarray(values))
    assert found.flags.c_contiguous and np.array_equal(found, FORMATS[name].encode(values))


@pytest.mark.parametrize("name", BLOCKED)
def test_scales_that_do_not_fit_are_refused(name):
    values = np.full((1, 256), 3e38, dtype=np.float32)
    if name == "mxfp4":  # whose scale has the exponents of a float32
        assert np.isfinite(FORMATS[name].decode(FORMATS[name].encode(values))).all()
        return
    with pytest.raises(UserError, match="bf16 or f32"):
        FORMATS[name].encode(values)


@pytest.mark.parametrize("name, steps", [("q8_0", 127), ("q4_0", 8)])
def test_blocks_are_near(name, steps):
    values = np.random.default_rng(5).standard_normal((10, 256)).astype(np.float32)
    found = FORMATS[name].decode(FORMATS[name].encode(values)).reshape(-1, 32)
    largest = np.abs(values.reshape(-1, 32)).max(axis=1, keepdims=True)
    # Half a step; q4_0 has one step fewer on one side; and the scale is a float16.
    worst = largest / steps * (0.5 if name == "q8_0" else 1.0) + largest * 2e-3
    assert (np.abs(found - values.reshape(-1, 32)) <= worst).all()


@pytest.mark.parametrize("name", BLOCKED)
def test_rows_of_no_whole_blocks_are_refused(name):
    with pytest.raises(UserError, match=r"multiple of (32|256), not 40"):
        FORMATS[name].row_bytes(40)


def test_unknown_format_names_the_known_ones():
    with pytest.raises(UserError, match="f32, f16, bf16, q8_0, q4_0"):
        number_format("f8")
