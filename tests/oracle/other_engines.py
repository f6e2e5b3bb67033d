"""Logits of a kit's models by other engines.

    python tests/oracle/other_engines.py

makes a kit and prints, for each of its models, the largest difference of a logit between the kit
and each engine that is installed: transformers on the checkpoint, llama.cpp on the GGUF files.
Needs torch and transformers, or llama_cpp.
"""

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from flashinfer.formats.safetensors import SafetensorsFile
from flashinfer.oracle.kits.configs import MODELS
from flashinfer.oracle.kits.kit import goldens_of, write_kit

# Architectures whose code comes with their checkpoints; those of GGUF that llama.cpp lacks.
OF_OTHERS, NOT_IN_LLAMA_CPP = ("sparsellama", "bamboo", "smallthinker"), ("bamboo",)


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


def main():
    print("| model | engine | largest difference | median of the tokens' |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        kit = Path(folder) / "kit"
        write_kit(kit)
        for model in MODELS:
            for golden in goldens_of(model):
                engine = engine_of(model, golden)
                if engine is None:
                    continue
                tokens, logits = right(kit, golden)
                worst = np.abs(engine(kit / golden.source, tokens) - logits).max(axis=1)
                name = golden.source.removeprefix("models/")
                figures = f"{worst.max():.1e} | {np.median(worst):.1e}"
                print(f"| {name} | {engine.__name__[3:]} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
