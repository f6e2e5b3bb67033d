"""A model beside other logits: files of every kind, and files that are none."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashinfer import Model, UserError
from flashinfer.oracle.trace import trace
from flashinfer.study.against import compare_logits
from flashinfer.study.divergence import Comparison

IDS = np.random.default_rng(3).integers(3, 96, 40).tolist()
CONTEXT = 15  # cuts IDS into three sequences
SHAPE = len(IDS), 96


@pytest.fixture(scope="module")
def ours(plain):
    """Our logits, sequence after sequence: SHAPE float32."""
    with Model.open(plain, context=CONTEXT) as model:
        parts = [IDS[i : i + CONTEXT] for i in range(0, len(IDS), CONTEXT)]
        return np.concatenate([model.logits(part) for part in parts])


@pytest.fixture(scope="module")
def theirs(ours):
    """The same, perturbed."""
    noise = np.random.default_rng(1).normal(0, 0.1, SHAPE).astype(np.float32)
    return ours + noise


def compared(plain, path):
    with Model.open(plain, context=CONTEXT) as model:
        return compare_logits(model, IDS, path)


def expected(ours, theirs):
    comparison = Comparison()
    for i, token in enumerate(IDS[1:]):
        if (i + 1) % CONTEXT:  # the last token of a sequence predicts nothing
            comparison.add(ours[i], theirs[i], token)
    return comparison


@pytest.mark.parametrize("kind", ["f2.npy", "f4.npy", "f8.npy", "f4.npz", "two.npz", "safetensors"])
def test_files(plain, ours, theirs, tmp_path, kind):
    path, its = tmp_path / f"x.{kind}", theirs
    if kind == "safetensors":
        save_file({"logits": its, "other": its[:3]}, path)
    elif kind == "two.npz":
        np.savez_compressed(path, other=its[:3], logits=its)
    elif kind == "f4.npz":
        np.savez(path, its)
    else:
        its = its.astype(kind[:2])
        np.save(path, its)
    found, right = compared(plain, path), expected(ours, its)
    assert found.distance == right.distance() and found.distance.kl_mean > 0
    assert (found.base, found.other) == (right.base, right.model)
    assert found.tokens == len(IDS) - 3 and found.named is None


def test_a_trace_of_ours_is_no_distance_away(plain, tmp_path):
    path = tmp_path / "x.safetensors"
    with Model.open(plain) as model:
        trace(model, IDS, path)
        assert compare_logits(model, IDS, path).distance.kl_largest == 0
        with pytest.raises(UserError, match="is a trace of other tokens"):
            compare_logits(model, [7, *IDS[1:]], path)


def npy(array):
    def write(path):
        np.save(path, array, allow_pickle=True)

    return write


def header_of(text):
    def write(path):
        text_ = text.encode() + b"\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(text_).to_bytes(2, "little") + text_)

    return write


def with_nan(path):
    array = np.zeros(SHAPE, dtype=np.float32)
    array[20, 5] = np.nan
    np.save(path, array)


def cut(path):
    np.save(path, np.zeros(SHAPE, dtype=np.float32))
    path.write_bytes(path.read_bytes()[:-4000])


def safetensors_trace(path):
    save_file({"logits": np.zeros(SHAPE, dtype=np.float32)}, path, {"flashinfer.tokens": "[1,"})


def two_arrays(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(SHAPE), b=np.zeros(SHAPE))


def damaged_zip(path):
    with open(path, "wb") as file:
        np.savez_compressed(file, np.random.default_rng(0).normal(size=SHAPE))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


DAMAGED = {
    "another length": (
        npy(np.zeros((39, 96), "f4")),
        r"has logits of shape \(39, 96\).*\(40, 96\)",
    ),
    "another vocabulary": (npy(np.zeros((40, 97), "f4")), r"of shape \(40, 97\).*\(40, 96\)"),
    "another kind": (npy(np.zeros(SHAPE, "i4")), "has 'int32' of shape"),
    "one dimension": (npy(np.zeros(40, "f4")), r"of shape \(40,\)"),
    "columns first": (npy(np.zeros((96, 40), "f4").T), "in Fortran order"),
    "objects": (npy(np.full(SHAPE, None)), "has 'object' of shape"),
    "NaN": (with_nan, "token id 5 after token 20 of the text is nan"),
    "infinite": (npy(np.full(SHAPE, -np.inf)), "token id 0 after token 0 of the text is -inf"),
    "cut off": (cut, "ends before row .*: it is cut off"),
    "no header": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), "not a sound .npy file"),
    "a hostile header": (header_of("{'descr': __import__('os')}"), "not a sound .npy file"),
    "a huge shape": (
        header_of("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000, 96)}"),
        r"of shape \(1000000000000000, 96\)",
    ),
    "nothing": (lambda path: path.write_bytes(b""), "is not a .npy, .npz or .safetensors file"),
    "a text": (lambda path: path.write_bytes(b"hello, you"), "is not a .npy, .npz or"),
    "a directory": (lambda path: path.mkdir(), "is a directory"),
    "no logits among several": (two_arrays, "has 2 arrays and none is named logits"),
    "a damaged zip": (damaged_zip, "cannot be read|not a sound"),
    "half a zip": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(50)), "not a sound .npz"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_files_that_are_refused_in_one_line(plain, tmp_path, what):
    write, message = DAMAGED[what]
    path = tmp_path / "x.npy"
    write(path)
    with pytest.raises(UserError, match=message) as caught:
        compared(plain, path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_trace_with_damaged_tokens(plain, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors_trace(path)
    with pytest.raises(UserError, match=r"flashinfer\.tokens: not JSON"):
        compared(plain, path)


def test_perplexity_and_divergence_as_transformers_has_them(tmp_path):
    """Of a committed checkpoint, by transformers in float64, against perturbed logits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from conftest import DATA
    from flashinfer.formats.convert import convert

    model = transformers.AutoModelForCausalLM.from_pretrained(
        DATA / "llama-silu", dtype=torch.float64
    )
    with torch.no_grad():
        base = model(torch.tensor([IDS])).logits[0]
    other = base + torch.from_numpy(np.random.default_rng(2).normal(0, 0.3, SHAPE))
    np.save(tmp_path / "other.npy", other.numpy())
    p, q = (torch.log_softmax(logits[:-1], dim=1) for logits in (base, other))
    kl = (p.exp() * (p - q)).sum(dim=1)
    following = torch.tensor(IDS[1:])

    convert(DATA / "llama-silu", tmp_path / "x.flash", "f32")
    with Model.open(tmp_path / "x.flash") as ours:
        found = compare_logits(ours, IDS, tmp_path / "other.npy")
    for ours_, theirs_ in ((found.base, p), (found.other, q)):
        perplexity = torch.nn.functional.nll_loss(theirs_, following).exp()
        assert ours_.perplexity == pytest.approx(float(perplexity), rel=1e-3)
    assert found.distance.kl_mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.distance.kl_median == pytest.approx(float(kl.quantile(0.5)), rel=1e-3)
    assert found.distance.kl_largest == pytest.approx(float(kl.max()), rel=1e-3)
