"""The kit against other implementations, each where it is installed."""

import numpy as np
import pytest

from flashinfer import kernels
from flashinfer.formats.sources.gguf import GgufFile
from flashinfer.oracle.kits.configs import MODELS
from flashinfer.oracle.kits.kit import TOLERANCE, goldens_of, write_kit
from flashinfer.oracle.kits.number_formats import ENCODED, NAMES, tensors_of
from flashinfer.oracle.kits.samplers import sampler_cases
from other_engines import NOT_IN_LLAMA_CPP, OF_OTHERS, by_llama_cpp, by_transformers, right

pytestmark = [
    pytest.mark.skipif(kernels.in_use != "native", reason="no compiled kernels"),
    pytest.mark.filterwarnings("default"),
]
GGUF_FILES = [(model, number) for model in MODELS for number in range(len(model.gguf))]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit") / "kit"
    write_kit(folder)
    return folder


@pytest.mark.parity
@pytest.mark.parametrize(
    "model", [m for m in MODELS if m.model_type not in OF_OTHERS], ids=lambda m: m.name
)
def test_transformers_gives_the_logits(kit, model):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if "quantization_config" in model.config or model.name.endswith("mxfp4"):
        pytest.importorskip("accelerate")  # transformers loads such checkpoints with it
    golden = goldens_of(model)[0]
    tokens, logits = right(kit, golden)
    found = by_transformers(kit / golden.source, tokens)
    assert np.abs(found - logits).max() <= TOLERANCE


@pytest.mark.parametrize(
    "model, number", [f for f in GGUF_FILES if f[0].model_type not in NOT_IN_LLAMA_CPP],
    ids=lambda part: getattr(part, "name", part),
)  # fmt: skip
def test_llama_cpp_loads_the_gguf_files(kit, model, number):
    pytest.importorskip("llama_cpp")
    golden = goldens_of(model)[1 + number]
    tokens, logits = right(kit, golden)
    worst = np.abs(by_llama_cpp(kit / golden.source, tokens) - logits).max(axis=1)  # of each token
    # It rounds activations; a token of a mixture may use another expert where two nearly tie.
    assert np.median(worst) < (0.02 if model.gguf[number] == "f16" else 0.2)


@pytest.mark.parametrize("model, number", GGUF_FILES, ids=lambda part: getattr(part, "name", part))
def test_gguf_package_reads_the_weights(kit, model, number):
    gguf = pytest.importorskip("gguf")
    golden = goldens_of(model)[1 + number]
    reader = gguf.GGUFReader(kit / golden.source)
    kinds = {tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert kinds == {"f32", model.gguf[number]}
    with GgufFile(kit / golden.source) as ours:
        assert {tensor.name for tensor in reader.tensors} == set(ours.tensors)
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            expected = ours.decode(ours.tensors[tensor.name].type, ours.raw_rows(tensor.name))
            assert np.array_equal(values.reshape(expected.shape), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mxfp4"])
def test_gguf_package_decodes_and_encodes_the_same(name):
    gguf = pytest.importorskip("gguf")
    kind, tensors = gguf.GGMLQuantizationType[name.upper()], tensors_of(name)
    rows = tensors["rows"].view(np.float16) if name == "f16" else tensors["rows"]
    values = gguf.quants.dequantize(rows, kind).reshape(tensors["values"].shape)
    # Equal as numbers: of a zero the package does not keep the sign.
    assert np.array_equal(values, tensors["values"])
    if name in ENCODED:
        encoded = gguf.quants.quantize(tensors["source"], kind).view(np.uint8)
        assert np.array_equal(encoded.reshape(tensors["encoded"].shape), tensors["encoded"])


def comparable(case):
    """Whether transformers keeps the same tokens: it draws, and keeps all that tie with the k-th,
    of which a Sampler keeps the first, so that they are k."""
    ties = len(set(case["logits"])) == 1
    return case["temperature"] > 0 and not (ties and case["top_k"])


@pytest.mark.parity
@pytest.mark.parametrize(
    "case", [c for c in sampler_cases() if comparable(c)], ids=lambda c: f"seed {c['seed']}"
)
def test_transformers_processors_give_the_probabilities(case):
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation")
    processors = []
    if case["top_k"]:
        processors.append(generation.TopKLogitsWarper(case["top_k"]))
    if case["top_p"] < 1:
        processors.append(generation.TopPLogitsWarper(case["top_p"]))
    processors.append(generation.TemperatureLogitsWarper(case["temperature"]))
    scores = torch.tensor(case["logits"], dtype=torch.float32)[None]
    for processor in processors:
        scores = processor(None, scores)
    found = torch.softmax(scores.double(), dim=-1)[0].numpy()
    expected = np.zeros(len(found))
    expected[case["kept"]] = case["probabilities"]
    if len(set(case["logits"])) == 1:  # of equal logits either may keep any
        found, expected = np.sort(found), np.sort(expected)
    np.testing.assert_allclose(found, expected, atol=1e-7)
