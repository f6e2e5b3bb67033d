"""Logits of a kit's models by several engines.

    python tests/oracle/other_engines.py

makes a kit and prints, for each architecture, how far the logits of the engines that are installed
are from the kit's, which are this engine's in f32: transformers on checkpoints, llama.cpp on GGUF
files, and this engine on what ``convert`` makes of those. Of each model's tokens the median of the
largest differences is taken, and of these the worst model's; in brackets stands the largest
difference of any token. Needs torch and transformers, or llama_cpp.
"""

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flashinfer import Model
from flashinfer.formats.convert import convert
from flashinfer.formats.safetensors import SafetensorsFile
from flashinfer.oracle.kits.configs import MODELS
from flashinfer.oracle.kits.kit import goldens_of, write_kit

# Architectures whose code comes with their checkpoints; those of GGUF that llama.cpp lacks, or of
# which it knows the published sizes only (tests/formats/test_gguf_gemma3n.py has them).
OF_OTHERS = ("sparsellama", "bamboo", "smallthinker")
NOT_IN_LLAMA_CPP = ("bamboo", "gemma3n_text")


def right(kit, golden):
    """(tokens (T,), logits (T, vocab_size)) of a model of the kit."""
    described = json.loads((kit / "manifest.json").read_text())["models"]
    tokens = {g["logits"]: model["tokens"] for model in described for g in model["goldens"]}
    with SafetensorsFile(kit / golden.logits) as file:
        return tokens[golden.logits], file.read_rows("logits")


def by_transformers(folder, tokens):
    """Logits (T, vocab_size) of a checkpoint, in float32."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)[None]).logits[0].numpy()


def by_llama_cpp(path, tokens):
    """Logits (T, vocab_size) of a GGUF file."""
    import llama_cpp

    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    llama.eval(tokens)
    return llama.scores[: len(tokens)].copy()


def engine_of(model, golden):
    """What computes a model's checkpoint or GGUF file, or None where nothing here does."""
    if not golden.source.endswith(".gguf"):
        known = model.model_type not in OF_OTHERS and find_spec("transformers")
        return by_transformers if known else None
    known = model.model_type not in NOT_IN_LLAMA_CPP and find_spec("llama_cpp")
    return by_llama_cpp if known else None


def by_this_engine(path, tokens):
    """Logits (T, vocab_size) of a GGUF file, converted with its own number formats."""
    bundle = path.with_suffix(".flash")
    convert(path, bundle)
    with Model.open(bundle, context=len(tokens)) as model:
        return model.logits(tokens)


def differences(kit):
    """{architecture: {(form, whether by this engine): [each model's differences of logits, the
    largest of each token]}}; a form is f32, f16 or blocks."""
    found = {}
    models = [(model, golden) for model in MODELS for golden in goldens_of(model)]
    for model, golden in tqdm(models, unit="file"):
        of_gguf = golden.source.endswith(".gguf")
        form = "f32" if not of_gguf else "f16" if golden.source.endswith("f16.gguf") else "blocks"
        tokens, logits = right(kit, golden)
        for engine in filter(None, (engine_of(model, golden), by_this_engine if of_gguf else None)):
            largest = np.abs(engine(kit / golden.source, tokens) - logits).max(axis=1)
            column = form, engine is by_this_engine
            found.setdefault(model.model_type, {}).setdefault(column, []).append(largest)
    return found


def shown(differences):
    """A cell of the table."""
    if not differences:
        return ""
    worst = max(np.median(of_tokens) for of_tokens in differences)
    return f"{worst:.1e} ({max(map(np.max, differences)):.1e})"


def main():
    with tempfile.TemporaryDirectory() as folder:
        write_kit(Path(folder) / "kit")
        found = differences(Path(folder) / "kit")
    columns = {
        "transformers, f32": ("f32", False),
        "llama.cpp, f16": ("f16", False), "this engine, f16": ("f16", True),
        "llama.cpp, blocks": ("blocks", False), "this engine, blocks": ("blocks", True),
    }  # fmt: skip
    print("| architecture |", " | ".join(columns), "|")
    print("|---" * (1 + len(columns)) + "|")
    for name, of_columns in sorted(found.items()):
        cells = (shown(of_columns.get(column)) for column in columns.values())
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
