"""A GGUF file in each number format, here and in llama.cpp.

Both round what is multiplied to 8 bits, llama.cpp in blocks of 256 values before K-quants and
ternary weights, with scales of 16 bits before others. So logits differ by what that moves, and each
is compared with those of the same weights in float32.
"""

import numpy as np
import pytest

from flashinfer import Model
from flashinfer.formats.convert import convert
from flashinfer.formats.number_formats import FORMATS

WIDTH, NEURONS, HEADS, VOCABULARY, LAYERS = 256, 512, 4, 96, 2
IDS = np.random.default_rng(3).integers(3, VOCABULARY, 24)
BLOCKS = [name for name, format in FORMATS.items() if format.block > 1]


def write_llama(gguf, path, name):
    """A random Llama, all of whose matrices are in one number format."""
    random, format = np.random.default_rng(5), FORMATS[name]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(NEURONS)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    matrices = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH)}
    norms = ["output_norm"]
    for block in (f"blk.{i}" for i in range(LAYERS)):
        norms += [f"{block}.attn_norm", f"{block}.ffn_norm"]
        matrices |= {f"{block}.attn_{p}": (WIDTH, WIDTH) for p in ("q", "k", "v", "output")}
        matrices |= {f"{block}.ffn_{p}": (NEURONS, WIDTH) for p in ("gate", "up")}
        matrices[f"{block}.ffn_down"] = (WIDTH, NEURONS)
    for tensor, shape in matrices.items():
        values = random.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[1])
        if name.startswith("tq"):  # of -1, 0 and 1 times one scale
            values = np.sign(np.rint(values * np.sqrt(shape[1]))) / np.float32(np.sqrt(shape[1]))
        raw = format.encode(values)
        kind = gguf.GGMLQuantizationType[name.upper()]
        writer.add_tensor(f"{tensor}.weight", raw.reshape(shape[0], -1), raw_dtype=kind)
    for norm in norms:
        writer.add_tensor(f"{norm}.weight", random.uniform(0.5, 1.5, WIDTH).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", BLOCKS)
def test_logits_are_those_of_llama_cpp(name, tmp_path):
    gguf, llama_cpp = pytest.importorskip("gguf"), pytest.importorskip("llama_cpp")
    path = tmp_path / "x.gguf"
    write_llama(gguf, path, name)
    convert(path, tmp_path / "x.flash")
    convert(path, tmp_path / "exact.flash", "f32")
    found = []
    for bundle in ("x.flash", "exact.flash"):
        with Model.open(tmp_path / bundle, context=64, kv_dtype="f32") as model:
            assert set(model.bundle.ffn_formats.split(",")) <= {name, "f32"}
            found.append(model.logits(IDS))
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    llama.eval(IDS.tolist())
    ours, exact = found
    off, theirs = (np.abs(logits - exact).max(axis=1) for logits in (ours, llama.scores[:24]))
    assert theirs.max() < 0.06 * np.abs(exact).max()
    nearer = FORMATS[name].block == 256
    assert np.median(off) < (1 if nearer else 1.25) * np.median(theirs)
