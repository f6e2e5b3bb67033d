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


@pytest.mark.parametrize("name", BLOCKED)
def test_blocks_are_ggmls(name):
    """Bit for bit what the gguf package writes and reads."""
    quants = pytest.importorskip("gguf.quants")
    kind = quants.GGMLQuantizationType[name.upper()]
    random = np.random.default_rng(4)
    values = random.standard_normal((40, 96)).astype(np.float32)
    values *= 10 ** random.uniform(-3, 3, (40, 1)).astype(np.float32)
    values[3, :32] = 0
    values[4, 5] = -values[4, :32].max() * 3
    raw = FORMATS[name].encode(values)
    assert np.array_equal(raw, quants.quantize(values, kind))
    assert np.array_equal(FORMATS[name].decode(raw), quants.dequantize(raw, kind))


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
    with pytest.raises(UserError, match="multiple of 32, not 40"):
        FORMATS[name].row_bytes(40)


def test_unknown_format_names_the_known_ones():
    with pytest.raises(UserError, match="f32, f16, bf16, q8_0, q4_0"):
        number_format("f8")
