"""GGUF files of models that see images are their texts, which are known under other names."""

import numpy as np
import pytest

from flashinfer import Model
from flashinfer.formats.architectures import model_config
from flashinfer.formats.bundle.layout import layout
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError
from flashinfer.formats.sources.gguf_forms import TEXTS
from flashinfer.oracle.kits.configs import MODELS
from flashinfer.oracle.kits.gguf_file import gguf_bytes
from flashinfer.oracle.kits.gguf_form import EXACT, gguf_metadata, gguf_tensors
from flashinfer.oracle.kits.weights import drawn

IDS = np.random.default_rng(3).integers(3, 96, 24)


def file_of(model_type, folder, name=None, **further):
    """A GGUF file of a small model of the kit, its architecture under another ``name``."""
    kit = next(m for m in MODELS if m.model_type == model_type and m.gguf)
    config = model_config(kit.hugging_face_config())
    tensors = gguf_tensors(
        model_type, config, lambda n, shape: drawn(config, "text", n, shape), layout(config)
    )
    metadata = gguf_metadata(model_type, config, "text")
    own = metadata["general.architecture"]
    metadata |= {"tokenizer.ggml.model": "no_vocab", f"{own}.vocab_size": config.vocab_size}
    metadata |= {f"{own}.{key}": value for key, value in further.items()}
    metadata = {
        (f"{name}.{key.removeprefix(own + '.')}" if name and key.startswith(f"{own}.") else key): v
        for key, v in metadata.items()
    }
    metadata["general.architecture"] = name or own
    path = folder / f"{name or own}.gguf"
    path.write_bytes(gguf_bytes(metadata, tensors, "f16", exact=EXACT))
    head = config.layers[0].attention.head_dim
    return path, [head // 2 - 2, 1, 1, 0]


def logits_of(path):
    convert(path, path.with_suffix(".flash"))
    with Model.open(path.with_suffix(".flash"), context=32) as model:
        return model.logits(IDS)


@pytest.mark.parametrize("name", TEXTS)
def test_they_are_the_model_that_is_known(name, tmp_path):
    model_type = TEXTS[name].model_type
    plain, sections = file_of(model_type, tmp_path)
    seeing, _ = file_of(model_type, tmp_path, name, **{"rope.dimension_sections": sections})
    expected = logits_of(plain)
    assert np.array_equal(logits_of(seeing), expected)
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(seeing), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    llama.eval(IDS.tolist())
    difference = np.abs(llama.scores[: len(IDS)] - expected).max(axis=1)
    assert np.median(difference) < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("name", TEXTS)
def test_what_else_they_say_is_checked(name, tmp_path):
    path, _ = file_of(TEXTS[name].model_type, tmp_path, name, **{"attention.max_alibi_bias": 8.0})
    with pytest.raises(FormatError, match="max_alibi_bias"):
        convert(path, tmp_path / "x.flash")
