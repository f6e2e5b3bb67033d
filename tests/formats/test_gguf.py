"""GGUF files: the same model from both forms, the bits that are kept, and files that lie."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import DATA
from flashinfer import Model
from flashinfer.calibration.calibrate import calibrate
from flashinfer.formats.bundle.reader import Bundle, verify
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.number_formats import FORMATS
from flashinfer.formats.sources.gguf import GgufFile
from flashinfer.oracle.kits.configs import GGUF_MODELS
from flashinfer.oracle.kits.hugging_face_form import write_hugging_face

gguf = pytest.importorskip("gguf")

from make_gguf import checkpoint_of, random_qwen2, write_gguf  # noqa: E402

SAME = {  # checkpoint: activation, where GGUF's architecture has another
    "llama-silu": None, "llama-linear": None, "llama-yarn": None, "mistral": None,
    "qwen2": None, "qwen3": None, "falcon-7b": None, "falcon-new-one-norm": None,
    "falcon-new": "relu", "phi": None, "phi3": None, "gemma": None, "nemotron": None,
    "olmoe": None, "qwen2-moe": None, "qwen3-moe": None, "mixtral": None, "granitemoe": None,
    "gpt-oss": None, "gpt-neox": None, "gpt-neox-in-turn": "relu", "gpt2": None,
    "arcee": None, "gemma2": None, "gemma3": None, "dots1": None, "glm4-moe": None,
    "granite": None, "ernie4-5": None, "ernie4-5-moe": None, "smollm3": None, "ministral3": None,
    "olmo2": None, "olmo3": None, "hunyuan": None, "hunyuan-moe": None,
    "granite-hybrid": None, "granite-hybrid-rope": None,
    "nemotron-h": None, "nemotron-h-moe": None,
    "gemma4": None, "gemma4-moe": None,
    "deepseek-v2-lite": None, "deepseek-v3": None, "deepseek-v3 older": None,
}  # fmt: skip
Q = gguf.GGMLQuantizationType


@pytest.mark.parametrize("name", SAME)
def test_the_same_logits_from_both_forms(name, tmp_path):
    activation, (name, *older) = SAME[name], name.split()
    folder = checkpoint_of(name, tmp_path)
    path = write_gguf(folder, tmp_path / "x.gguf", older=bool(older))
    convert(path, tmp_path / "gguf.flash", "f32", activation=activation)
    convert(folder, tmp_path / "hf.flash", "f32")
    verify(tmp_path / "gguf.flash")
    ids = np.load(DATA / name / "logits.npz")["ids"]
    logits = []
    for form in ("gguf", "hf"):
        with Model.open(tmp_path / f"{form}.flash", context=len(ids)) as model:
            logits.append(model.logits(ids))
    # Norms that GGUF holds with one added may differ in their last bit.
    tolerance = 1e-4 if name in ("gemma", "gemma2", "gemma3", "nemotron") else 0
    assert np.abs(logits[0] - logits[1]).max() <= tolerance
    with Bundle(tmp_path / "gguf.flash") as bundle:
        assert bundle.config.eos_token_ids == (2,)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", ["f16", "q8_0", "q4_0"])
def test_latent_attention_is_kept_bit_for_bit(name, older, tmp_path):
    """But for what makes keys, in older files: it has to be turned, and keeps 16 bits then."""
    folder, kind = tmp_path / "hf", Q[name.upper()]
    folder.mkdir()
    wide = next(model for model in GGUF_MODELS if model.name == "gguf-deepseek-v3")
    write_hugging_face(wide, folder)
    path = write_gguf(folder, tmp_path / "x.gguf", lambda name, values: kind, older=older)
    convert(path, tmp_path / "x.flash")
    with GgufFile(path) as source, Bundle(tmp_path / "x.flash") as bundle:
        for part, columns in (("k", 32), ("v", 32)):
            tensor = bundle.tensors[f"layers.1.{part}_b_proj.weight"]
            found = bundle.file.read_bytes(tensor.offset, tensor.nbytes)
            if not older:
                assert tensor.format is FORMATS[name] and tensor.columns == columns
                raw = source.raw_rows(f"blk.1.attn_{part}_b.weight")
                assert np.array_equal(found, raw.reshape(-1))
                continue
            whole = source.tensors["blk.1.attn_kv_b.weight"]
            decoded = source.decode(whole.type, source.raw_rows(whole.name)).reshape(4, 64, 32)
            ours = tensor.format.decode(found.reshape(tensor.rows, -1)).reshape(4, 32, 32)
            if part == "v":
                assert tensor.format is FORMATS[name]
                assert np.array_equal(ours, decoded[:, 32:])
            else:
                assert tensor.format is FORMATS["f16"]
                assert np.array_equal(ours, decoded[:, :32].swapaxes(1, 2).astype(np.float16))


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_kept_bit_for_bit(name, tmp_path):
    """Where neurons are read one by one: all but the down projection's blocks, which lie across
    neurons and are made anew. test_whole_units.py has the others."""
    kind, format = Q[name.upper()], FORMATS[name]
    folder = random_qwen2(tmp_path / "hf")
    path = write_gguf(folder, tmp_path / "x.gguf", lambda name, values: kind)
    convert(path, tmp_path / "x.flash", activation="relu")
    with GgufFile(path) as source, Bundle(tmp_path / "x.flash") as bundle:
        for ours, theirs in (("q_proj", "attn_q"), ("o_proj", "attn_output")):
            tensor = bundle.tensors[f"layers.0.{ours}.weight"]
            raw = bundle.file.read_bytes(tensor.offset, tensor.nbytes)
            assert tensor.format is format
            assert np.array_equal(raw, source.raw_rows(f"blk.0.{theirs}.weight").reshape(-1))
        bundles = bundle.tensors["layers.0.ffn.bundles"]
        raw = bundle.file.read_bytes(bundles.offset, bundles.nbytes).reshape(512, 3, -1)
        for part, name in enumerate(("gate", "up")):
            assert np.array_equal(raw[:, part], source.raw_rows(f"blk.0.ffn_{name}.weight"))
        tensor = source.tensors["blk.0.ffn_down.weight"]
        down = source.decode(tensor.type, source.raw_rows(tensor.name)).T
        found = bundles.format.decode(raw[:, 2].copy())
        if format.block == 1:
            assert np.array_equal(found, down)
        else:
            error = 4 * 2.0 ** (-8 * format.block_bytes / format.block)
            assert np.linalg.norm(found - down) <= error * np.linalg.norm(down)


@pytest.mark.parametrize("kind", [Q.IQ3_S, Q.IQ2_XXS, Q.IQ1_S])
def test_other_blocks_are_made_anew_and_said(kind, tmp_path, cli):
    """Held against gguf's own dequantisation."""
    folder = random_qwen2(tmp_path / "hf")
    path, target = tmp_path / "x.gguf", tmp_path / "x.flash"
    random, block = np.random.default_rng(1), gguf.GGML_QUANT_SIZES[kind]
    raws = {}

    def tensors(writer):
        inner = writer.add_tensor

        def add(name, values):
            if values.ndim != 2:
                return inner(name, values)
            rows, columns = values.shape
            raw = random.integers(0, 255, (rows, columns // block[0], block[1]), dtype=np.uint8)
            scale = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
            raw[..., :2] = scale
            raws[name] = raw.reshape(rows, -1)
            return inner(name, raws[name], raw_dtype=kind)

        writer.add_tensor = add

    write_gguf(folder, path, metadata=tensors)
    code, _, err = cli("convert", path, target)
    assert code == 0 and f"{kind.name} is requantised" in err, err
    values = gguf.quants.dequantize(raws["blk.0.attn_output.weight"], kind)
    with Bundle(target) as bundle:
        tensor = bundle.tensors["layers.0.o_proj.weight"]
        assert tensor.format.name == "q4_K"
        expected = tensor.format.decode(tensor.format.encode(values))
        assert np.array_equal(bundle.read("layers.0.o_proj.weight"), expected)


@pytest.mark.parametrize("name", ["llama-silu", "bamboo"])
def test_powerinfers_files(name, tmp_path):
    """Transposed down projections, a ReLU, and predictors that calibrate takes from there."""
    random = np.random.default_rng(2)
    maps = [[random.standard_normal(s, dtype=np.float32) for s in ((8, 40), (72, 8))]
            for _ in range(2)]  # fmt: skip
    path = write_gguf(
        DATA / name, tmp_path / "x.powerinfer.gguf", predictors=maps,
        metadata=lambda writer: writer.add_float32("powerinfer.sparse_threshold", 0.5),
    )  # fmt: skip
    convert(path, tmp_path / "x.flash", "f32")
    shutil.copytree(DATA / name, tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "relu"}))
    convert(tmp_path / "hf", tmp_path / "hf.flash", "f32")
    ids = random.integers(3, 96, 40)
    logits = []
    for bundle in ("x.flash", "hf.flash"):
        with Model.open(tmp_path / bundle) as model:
            logits.append(model.logits(ids))
    assert np.array_equal(*logits)
    text = random.integers(3, 96, 600)
    found = calibrate(tmp_path / "x.flash", text, predictor_from=path)
    assert found.as_json()["predictor"] == {"between": "relu", "reads": "residual"}
    with Model.open(tmp_path / "x.flash") as model:
        h = random.standard_normal((3, 40)).astype(np.float32)
        scores = model.layers[1].feed_forward.predictor.scores(None, h)
    expected = np.maximum(h @ maps[1][0].T, 0) @ maps[1][1].T - 0.5
    np.testing.assert_allclose(scores, expected, atol=0.05)  # rounded to f16
    with pytest.raises(FormatError, match=r"blk\.0\.fc1\.weight is missing"):
        plain = write_gguf(DATA / name, tmp_path / "plain.gguf")
        calibrate(tmp_path / "x.flash", text, predictor_from=plain)


def test_an_activation_that_gguf_does_not_say(tmp_path):
    path = write_gguf(DATA / "llama-silu", tmp_path / "x.gguf")
    convert(path, tmp_path / "x.flash", "f32", activation="relu")
    with Bundle(tmp_path / "x.flash") as bundle:
        assert bundle.config.activations == "relu" and bundle.config.sparse
    with pytest.raises(FormatError, match="'sigmoid' is not supported"):
        convert(path, tmp_path / "y.flash", activation="sigmoid")
    with pytest.raises(UserError, match="only GGUF files do not"):
        convert(DATA / "llama-silu", tmp_path / "y.flash", activation="relu")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    write_gguf(
        DATA / "llama-silu", path,
        metadata=lambda writer: writer.add_token_list(["a", "b"] * 40),
    )  # fmt: skip
    return path


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_file_that_lies_gives_one_line(small, tmp_path, data):
    """Bytes of the header changed, the file cut: converted, or refused in one line."""
    raw = bytearray(small.read_bytes())
    with GgufFile(small) as file:
        header = len(raw) - sum(4 * np.prod(t.shape) for t in file.tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, int(header) - 1))
        width = data.draw(st.sampled_from((1, 4, 8)))
        value = data.draw(st.sampled_from((0, 1, 0x7F, 0xFF)) | st.integers(0, 255))
        raw[at : at + width] = bytes([value]) * width
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    try:
        convert(path, tmp_path / "bad.flash", "f32")
    except UserError as error:
        assert "\n" not in str(error) and "bad.gguf" in str(error)


def test_lies_of_each_kind(small, tmp_path):
    """Counts and lengths beyond the file are refused before anything is made of them."""
    raw, path = small.read_bytes(), tmp_path / "bad.gguf"
    huge = (1 << 60).to_bytes(8, "little")
    array = raw.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    name = raw.index(b"blk.0.attn_norm.weight")
    lies = {
        "do not fit the file": (8, huge), "metadata do not fit": (16, huge),
        "strings of 'tokenizer": (array, huge), "bytes of a tensor's name": (name - 8, huge),
        "dimensions": (name + 22, (9).to_bytes(4, "little")), "is not a GGUF file": (0, b"GGML"),
        "version 9": (4, b"\x09"),
        r"blk\\n0\.attn_norm.* has 9 dim": (name, b"blk\n0.attn_norm.weight" + b"\x09\0\0\0"),
    }  # fmt: skip
    for says, (at, value) in lies.items():
        path.write_bytes(raw[:at] + value + raw[at + len(value) :])
        with pytest.raises(FormatError, match=says):
            GgufFile(path)
    path.write_bytes(raw[:-100])
    with pytest.raises(FormatError, match="lies outside the file; is it cut"):
        GgufFile(path)


def test_a_key_that_stands_twice(tmp_path):
    """Of two values one would be taken without a word."""

    def twice(writer):
        writer.add_uint32("llama.vocab_size", 96)
        writer.add_uint32("llama.vocab_sizf", 97)

    path = write_gguf(DATA / "llama-silu", tmp_path / "x.gguf", metadata=twice)
    path.write_bytes(path.read_bytes().replace(b"llama.vocab_sizf", b"llama.vocab_size"))
    with pytest.raises(FormatError, match=r"metadata 'llama\.vocab_size' occurs twice"):
        GgufFile(path)
