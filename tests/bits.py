"""Digests of logits: the same on every machine, with every vector unit and every NumPy.

    python tests/bits.py [--write]

prints a JSON object of them, or writes it to tests/bits.json, with which test_portability.py
compares. A change of one is a change of that model's logits.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from flashinfer import Model
from flashinfer.cli.run import demo_model
from flashinfer.formats.architectures import model_config
from flashinfer.formats.bundle.layout import format_of, layout
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.bundle.writer import new_tensor, write_bundle
from flashinfer.formats.convert import convert
from flashinfer.formats.number_formats import FORMATS
from flashinfer.formats.tensors import FFN, PREDICTOR
from flashinfer.kernels import fixed_math
from flashinfer.oracle.digest import digest as oracle_digest
from flashinfer.oracle.kits.draws import uniform
from flashinfer.synth.shapes import opt_config
from flashinfer.transformer.kv_cache import KV_DTYPES

DATA = Path(__file__).parent / "data"
ENCODER_DATA = Path(__file__).parent / "encoders"
COMMITTED = Path(__file__).with_suffix(".json")
BLOCKS = "gpt-oss"  # its rows are whole blocks of 32, so that it exists in most number formats
SMALL = [name for name, format in FORMATS.items() if format.block <= 32]
WIDE = opt_config(256, 2, 4, 512, vocab_size=300, positions=64)  # whole blocks of 256


def digest(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[
        :16
    ]


def of_model(path, **options):
    with Model.open(path, **options) as model:
        n = min(40, model.config.max_position_embeddings - 8)
        ids = (np.arange(n) * 37 + 11) % (model.config.vocab_size - 3) + 3
        if model.config.encoder:
            found = model.encode([ids], logits=model.config.has_head)[0]
            return digest(*(a for a in (found.hidden, found.pooled, found.logits) if a is not None))
        prompt = model.logits(ids)
        return digest(prompt, *(model.forward([int(token)]) for token in ids[:8]))


def requantised(source, target, name):
    """The bundle ``source`` without its calibration, in another number format."""
    with Bundle(source, calibrated=False) as bundle:
        tensors = []
        for spec in bundle.specs:
            if spec.role == PREDICTOR:
                continue
            values = bundle.read(spec.name).reshape(spec.shape)
            format = format_of(spec, FORMATS[name], FORMATS[name])
            if spec.role == FFN:  # each part of a bundle has blocks of its own
                parts = np.split(values, bundle.config.layers[spec.layer].ffn.parts, axis=1)
                values = np.concatenate([format.encode(part) for part in parts], axis=1)
            tensors.append(new_tensor(spec.name, format, spec.shape, lambda v=values: [v]))
        write_bundle(target, tensors, bundle.hf_config, bundle.source)


def drawn(target, name):
    """A bundle of WIDE in a number format, whose weights are the same everywhere."""
    tensors = []
    for spec in layout(model_config(WIDE)):
        values, format = uniform(f"bits {spec.name}", spec.shape), FORMATS[name]
        format = format_of(spec, format, format)
        if spec.role == FFN:  # each part of a bundle has blocks of its own
            parts = np.split(values, 2, axis=1)
            values = np.concatenate([format.encode(part) for part in parts], axis=1)
        tensors.append(new_tensor(spec.name, format, spec.shape, lambda v=values: [v]))
    write_bundle(target, tensors, WIDE, {})


def all_digests():
    angles = np.arange(-5000, 5000) * np.pi / 7 + np.arange(10000) ** 2.0
    found = {
        "fixed_math": digest(*fixed_math.cos_sin(angles), fixed_math.exp(-np.abs(angles) / 99))
    }
    found["demo"] = of_model(demo_model())
    for mode in ("predicted", "dense"):
        with Model.open(demo_model(), neurons=mode) as model:
            of_layers = oracle_digest(model, list(range(5, 45)))
        found[f"demo, each layer, {mode}"] = list(of_layers.values())
    for dtype in KV_DTYPES:
        found[f"demo, {dtype} keys"] = of_model(demo_model(), kv_dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.flash"
        for name in (name for name in FORMATS if name not in SMALL):
            drawn(path, name)
            found[f"drawn, {name}"] = of_model(path)
        for name in SMALL:
            requantised(demo_model(), path, name)
            found[f"demo, dense, {name}"] = of_model(path)
        for source in (*sorted(DATA.iterdir()), *sorted(ENCODER_DATA.iterdir())):
            if not (source / "model.safetensors").exists():
                continue
            for name in SMALL if source.name == BLOCKS else ("f32",):
                convert(source, path, name)
                found[f"{source.name}, {name}"] = of_model(path)
    return found


if __name__ == "__main__":
    text = json.dumps(all_digests(), indent=1) + "\n"
    if "--write" in sys.argv:
        COMMITTED.write_text(text)
    else:
        print(text, end="")
