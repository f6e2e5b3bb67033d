"""GGUF files of published shapes, in the mixes of number formats that people download them in.

The routers of these models choose as those of ``flashinfer synth`` do, see flashinfer/synth. To be
written in minutes, a layer's experts have the same neurons in different orders, and the vocabulary
repeats its first TOKENS rows.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
from tqdm import tqdm

from flashinfer.formats.architectures import model_config
from flashinfer.formats.bundle.layout import layout
from flashinfer.formats.number_formats import FORMATS
from flashinfer.formats.sources.gguf import ALIGNMENT
from flashinfer.oracle.kits.gguf_file import gguf_header, is_exact
from flashinfer.oracle.kits.gguf_form import EXACT, gguf_metadata, gguf_tensors
from flashinfer.synth.experts import ExpertMaker

TOKENS = 1024
REPEATED = 0.4  # of a token's experts that the token before used, too
VOCABULARIES = ("embed_tokens.weight", "lm_head.weight")
# The larger format is for what is most sensitive; of K-quants the smaller where rows are no whole
# blocks. As llama.cpp's ``quantize`` chooses.
IN_BLOCKS_OF_32 = {"q4_K": "q5_0", "q5_K": "q5_1", "q6_K": "q8_0"}


def q4_k_m(name: str, layer: int, layers: int) -> str:
    """The format of a tensor of a Q4_K_M file."""
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    if name == "output.weight":
        return "q6_K"
    if "attn_qkv" in name:
        return "q5_K"
    return "q6_K" if more and ("attn_v" in name or "ffn_down" in name) else "q4_K"


def q4_0(name: str, layer: int, layers: int) -> str:
    """The format of a tensor of a Q4_0 file."""
    return "q6_K" if name == "output.weight" else "q4_0"


def mxfp4_moe(name: str, layer: int, layers: int) -> str:
    """The format of a tensor of an MXFP4 file, of which only experts are in MXFP4."""
    return "mxfp4" if "_exps" in name else "q8_0"


MIXES: dict[str, Callable[[str, int, int], str]] = {
    "Q4_0": q4_0, "Q4_K_M": q4_k_m, "MXFP4": mxfp4_moe,
}  # fmt: skip


class Drawn:
    """The values of a mixture's tensors, a layer at a time.

    Of experts there is one, and of the vocabulary the first TOKENS rows: the others repeat them.
    """

    def __init__(self, config):
        self.config, self.maker = config, ExpertMaker(config, REPEATED, seed=0)
        self.specs = {spec.name: spec for spec in layout(config)}
        self.neurons = lru_cache(1)(self._neurons)

    def __call__(self, name, shape):
        if name in self.specs:
            spec = self.specs[name]
            if name in VOCABULARIES:
                spec = replace(spec, shape=(min(TOKENS, spec.shape[0]), spec.shape[1]))
            return np.concatenate(list(self.maker.chunks(spec))).reshape(spec.shape)
        _, layer, _, part = name.split(".")
        values = self.neurons(int(layer))[part]
        return values if len(shape) == 2 else values[None]

    def _neurons(self, layer):
        """{"gate", "up", "down": values} of a layer's neurons, or of one expert."""
        ffn, random = self.config.layers[layer].ffn, np.random.default_rng([1, layer])
        shape = ffn.d_ffn, ffn.parts * ffn.hidden_size
        rows = np.concatenate(list(self.maker.own_chunks("ffn.bundles", layer, shape, random)))
        gate, up, down = np.split(rows, ffn.parts, axis=1)
        return {"gate": gate, "up": up, "down": down.T}


def write_gguf(path, fields, mix):
    """Write a mixture of the Hugging Face config ``fields`` to ``path``; mix: one of MIXES."""
    config, model_type = model_config(fields), fields["model_type"]
    by_layer = {}
    for spec in layout(config):
        by_layer.setdefault(spec.layer, []).append(spec)
    tensors_of = partial(gguf_tensors, model_type, config)
    tensors = {}
    for layer, specs in by_layer.items():
        shapes = tensors_of(lambda name, shape: np.broadcast_to(np.float32(0), shape), specs)
        for name, values in shapes.items():
            kind = format_of(name, values.shape, layer or 0, config.num_hidden_layers, mix)
            tensors[name] = values.shape, kind
    metadata = gguf_metadata(model_type, config, "synthetic")
    metadata = {**metadata, "tokenizer.ggml.model": "no_vocab"}
    draw = Drawn(config)
    with open(path, "wb") as file:
        file.write(gguf_header(metadata, tensors))
        for specs in tqdm(by_layer.values(), desc=f"write {path.name}", leave=False):
            for name, values in tensors_of(draw, specs).items():
                raw = encoded(name, values, *tensors[name])
                file.write(raw)
                file.write(bytes(-raw.nbytes % ALIGNMENT))


def format_of(name, shape, layer, layers, mix):
    """The number format of a tensor in one of MIXES."""
    if is_exact(name, shape, EXACT):
        return "f32"
    kind = MIXES[mix](name, layer, layers)
    return kind if shape[-1] % FORMATS[kind].block == 0 else IN_BLOCKS_OF_32[kind]


def encoded(name, values, shape, kind):
    """The bytes of a tensor, of which ``values`` may be the first rows or the first expert."""
    raw = FORMATS[kind].encode(values)
    if raw.ndim == 3:
        turns = range(shape[0]) if "down" not in name else [0] * shape[0]
        return np.stack([np.roll(raw[0], turn, axis=0) for turn in turns])
    return np.resize(raw, (*shape[:-1], raw.shape[-1]))
