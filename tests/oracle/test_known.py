"""The noise of each operation bounds what honest float32 arithmetic does, in any order of sums."""

import numpy as np
import pytest

from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.layers.ffn import RouterConfig
from flashinfer.formats.layers.norm import NormConfig
from flashinfer.oracle import known
from flashinfer.oracle.arithmetic import (
    KNOWN,
    UNIT,
    after_rounding,
    arithmetic_named,
    arithmetic_of,
    rounded,
)
from flashinfer.oracle.known import Known
from flashinfer.oracle.routing import choose, margins

PLAIN = KNOWN["float32"]


def deviations(expected, found):
    """The largest and the root mean square difference in units of noise."""
    units = np.abs(found - expected.value) / np.maximum(expected.spread, 1e-300)
    return units.max(), np.sqrt((units**2).mean())


def orders(random, x, w):
    """x w^T in float32, summed in several orders: NumPy's, one by one, and permuted."""
    yield x @ w.T
    for _ in range(3):
        order, total = random.permutation(x.shape[1]), np.zeros((len(x), len(w)), np.float32)
        for column in order:
            total += x[:, column, None] * w[:, column]
        yield total


@pytest.mark.parametrize("n", [8, 100, 1500])
@pytest.mark.parametrize("positive", [False, True])
def test_products_in_any_order(n, positive):
    random = np.random.default_rng(n)
    x, w = (random.standard_normal((m, n)).astype(np.float32) for m in (6, 20))
    if positive:
        x, w = np.abs(x), np.abs(w)
    expected = known.linear(Known(x.astype(float)), w.astype(float), None, "f32", PLAIN)
    for found in orders(random, x, w):
        worst, mean = deviations(expected, found.astype(float))
        assert worst < 6 and mean < 1.2
    sensitive = deviations(expected, (x @ w.T).astype(float) * (1 + 1e-4))
    assert sensitive[0] > 7 or positive or n > 1000


def test_noise_of_inputs_adds_up():
    random = np.random.default_rng(1)
    x, w = random.standard_normal((4, 64)), random.standard_normal((30, 64))
    noise = np.full_like(x, 1e-3)
    expected = known.linear(Known(x, noise), w, None, "f32", PLAIN)
    many = [(x + 1e-3 * random.standard_normal(x.shape)) @ w.T for _ in range(400)]
    assert np.allclose(np.std(many, axis=0), expected.spread, rtol=0.25)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind):
    random = np.random.default_rng(2)
    x = (random.standard_normal((50, 300)) * 3 + 1).astype(np.float32)
    w, b = (random.standard_normal(300).astype(np.float32) for _ in range(2))
    bias = b if kind == "layer" else None
    config = NormConfig(kind, 1e-6)
    expected = known.norm(
        Known(x.astype(float)), config, w.astype(float), None if bias is None else b.astype(float),
        PLAIN,
    )  # fmt: skip
    centred = x - x.mean(axis=1, keepdims=True) if kind == "layer" else x
    square = (centred * centred).mean(axis=1, keepdims=True) + np.float32(1e-6)
    found = centred / np.sqrt(square) * w
    found = found if bias is None else found + bias
    worst, mean = deviations(expected, found.astype(float))
    assert worst < 6 and mean < 1.2


@pytest.mark.parametrize("format", ["f16", "bf16", "q8_0"])
def test_rounding_is_that_of_the_formats(format):
    x = np.random.default_rng(3).standard_normal((7, 96)).astype(np.float32)
    found = rounded(x.astype(float), format)
    if format == "f16":
        assert np.array_equal(found, x.astype(np.float16))
    elif format == "bf16":
        torch = pytest.importorskip("torch")
        assert np.array_equal(found, torch.tensor(x).bfloat16().float().numpy())
    else:
        gguf = pytest.importorskip("gguf")
        kind = gguf.GGMLQuantizationType.Q8_0
        exact = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
        step = np.abs(x).reshape(7, -1, 32).max(axis=2).repeat(32, axis=1) / 127
        # float32 may round what lies in the middle either way.
        assert (np.abs(found - exact) < 1e-6 + (np.abs(found - x) > 0.499 * step) * step).all()


def test_noise_near_a_boundary_is_a_step():
    middle = 1 + UNIT["f16"]
    x, noise = np.array([1.0, middle, 1.0]), np.array([1e-6, 1e-6, 1e-2])
    found = after_rounding(x, noise, "f16")
    assert found[0] == 0 and found[1] == pytest.approx(2 * UNIT["f16"], rel=0.01)
    assert found[2] == pytest.approx(1e-2)


def test_choices_by_their_margin():
    config = RouterConfig(experts=4, experts_per_token=2)
    logits = np.array([[3.0, 1.0, 1.0 - 1e-9, 0.0]])
    choice = choose(config, Known(logits), None)
    assert choice.experts.tolist() == [[0, 1]]
    assert margins(choice, np.array([[0, 1]]))[0] == 0
    assert margins(choice, np.array([[0, 2]]))[0] < 1
    assert margins(choice, np.array([[0, 3]]))[0] > 1e5
    assert margins(choice, np.array([[0, 0]]))[0] == np.inf


def test_groups_that_tie_may_be_kept_either_way():
    config = RouterConfig(
        experts=6, experts_per_token=2, groups=3, groups_kept=1, group_by="max", scoring="sigmoid"
    )
    logits = np.array([[2.0, 1.0, 2.0 - 1e-9, 1.5, 0.0, -1.0]])
    choice = choose(config, Known(logits), None)
    assert choice.experts.tolist() == [[0, 1]]
    assert margins(choice, np.array([[0, 1]]))[0] == 0
    assert margins(choice, np.array([[2, 3]]))[0] < 1
    assert margins(choice, np.array([[4, 5]]))[0] > 1e4
    assert margins(choice, np.array([[0, 2]]))[0] > 1e4


@pytest.mark.parametrize("data", ["outlier", "constant", "normal"])
def test_a_norm_that_adds_one_square_after_the_other(data):
    random = np.random.default_rng(4)
    x = random.standard_normal((64, 2048)).astype(np.float32)
    if data == "outlier":
        x[:, 7] = 300
    elif data == "constant":
        x = np.sign(x) * np.float32(0.7)
    total = np.cumsum(x * x, axis=1, dtype=np.float32)[:, -1:]
    found = x / np.sqrt(total / np.float32(2048) + np.float32(1e-6))
    expected = known.norm(Known(x.astype(float)), NormConfig("rms", 1e-6), None, None, PLAIN)
    worst, mean = deviations(expected, found.astype(float))
    assert worst < 4 and mean < 1.1


def test_half_precision_in_a_wide_kernel_is_found():
    """x rounded to 16 bits in a product of 4096, which is declared to be float32."""
    random = np.random.default_rng(5)
    x, w = (random.standard_normal((m, 4096)) for m in (16, 32))
    expected = known.linear(Known(x), w, None, "f32", PLAIN)
    assert deviations(expected, rounded(x, "f16") @ w.T)[1] > 10


def test_arithmetic_of_files(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "llama.cpp"\nkeys = "q8_0"\nproducts = { f16 = "f32" }\n')
    found = arithmetic_named(str(path))
    assert (found.name, found.keys, found.queries) == ("mine.toml", "q8_0", "f16")
    assert found.products == {"f16": "f32"}
    for wrong in ({"keys": "f8"}, {"key": "f16"}, {"values": "q8_0"}, {"base": 3},
                  {"products": 3}, {"scaled_queries": "yes"}):  # fmt: skip
        with pytest.raises(FormatError, match=r"mine\.toml"):
            arithmetic_of(wrong, "mine.toml")
    with pytest.raises(UserError, match="is not one of"):
        arithmetic_named("float33")
