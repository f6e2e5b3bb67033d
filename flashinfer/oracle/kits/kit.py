"""Writing a conformance kit: a directory of tiny models, texts and numbers, and what is right.

docs/kits.md describes it for those who check another engine with it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flashinfer import kernels
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.errors import UserError
from flashinfer.formats.files import scratch_directory
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.oracle.kits import number_formats, texts
from flashinfer.oracle.kits.configs import MODELS, KitModel
from flashinfer.oracle.kits.draws import SEED, VERSION
from flashinfer.oracle.kits.gguf_form import gguf_of
from flashinfer.oracle.kits.golden import tokens_of, write_golden
from flashinfer.oracle.kits.hugging_face_form import write_hugging_face
from flashinfer.oracle.kits.safetensors_file import safetensors_bytes
from flashinfer.oracle.kits.samplers import sampler_cases

MANIFEST = "manifest.json"
TOLERANCE = 1e-4  # of a logit, for an engine that computes in float32


class Golden(NamedTuple):
    """A model in one form: paths within the kit of what is run, and of what is right."""

    source: str
    logits: str
    trace: str


def goldens_of(model: KitModel) -> list[Golden]:
    """The forms of a model: its checkpoint, which is a directory, and its GGUF files."""
    folder = f"models/{model.name}"
    found = [Golden(folder, f"{folder}/logits.safetensors", f"{folder}/trace.safetensors")]
    for name in model.gguf:
        base = f"{folder}/{name}"
        found.append(
            Golden(f"{base}.gguf", f"{base}.logits.safetensors", f"{base}.trace.safetensors")
        )
    return found


def write_kit(
    directory: Path | str, architectures: Sequence[str] = (), progress: Progress = no_progress
) -> JsonObject:
    """Write a kit to ``directory``, which must not exist or be empty; return its manifest.

    architectures  the ``model_type`` of the models that are written; (): all. The other parts of a
                   kit, which are small, are always written
    progress       is told the models done, as "kit"
    The directory appears whole or not at all. The bytes are the same on every machine, for which
    the compiled kernels are needed. Raises UserError.
    """
    if kernels.in_use != "native":
        raise UserError(
            "a kit is written with the compiled kernels, whose bits are the same on every machine; "
            "here are none, or FLASHINFER_KERNELS names others"
        )
    models, target = chosen_models(architectures), Path(directory)
    _refuse_target(target)
    with scratch_directory(target.parent, target.name) as scratch:
        folder = scratch / "kit"
        for part in ("models", "number_formats", "tokenizers", "chats", "samplers"):
            (folder / part).mkdir(parents=True)
        for number, model in enumerate(models):
            _write_model(model, folder, scratch)
            progress("kit", number + 1, len(models))
        for path, content in other_files():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        manifest = _manifest(models, folder)
        (folder / MANIFEST).write_bytes(_json(manifest))
        os.rename(folder, target)
    return manifest


def chosen_models(architectures: Sequence[str]) -> list[KitModel]:
    """The models of these architectures; (): all. Raises UserError where one has none."""
    known = list(dict.fromkeys(model.model_type for model in MODELS))
    for name in architectures:
        if name not in known:
            raise UserError(f"--arch {name}: the kit has no such model; it has {', '.join(known)}")
    return [m for m in MODELS if not architectures or m.model_type in architectures]


def _refuse_target(target: Path) -> None:
    if not target.parent.is_dir():
        raise UserError(f"{target}: cannot be written: {target.parent} is not a directory")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target}: is not a directory; name a new one")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target}: is not empty; name a new directory")


def _write_model(model: KitModel, folder: Path, scratch: Path) -> None:
    (folder / "models" / model.name).mkdir()
    write_hugging_face(model, folder / "models" / model.name)
    for name in model.gguf:
        (folder / "models" / model.name / f"{name}.gguf").write_bytes(gguf_of(model, name))
    for golden in goldens_of(model):
        source, logits, trace = (folder / path for path in golden)
        write_golden(source, model.name, logits, trace, scratch)


def other_files() -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the files that belong to no model."""
    for name in number_formats.NAMES:
        content = safetensors_bytes(number_formats.tensors_of(name))
        yield f"number_formats/{name}.safetensors", content
    for name, make in texts.TOKENIZERS.items():
        yield f"tokenizers/{name}/tokenizer.json", _json(make())
        yield f"tokenizers/{name}/cases.json", _json(texts.tokenizer_cases(name))
    for name, template in texts.TEMPLATES.items():
        yield f"chats/{name}/chat_template.jinja", template.encode()
        yield f"chats/{name}/cases.json", _json(texts.chat_cases(name))
    yield "samplers/cases.json", _json(sampler_cases())


def _manifest(models: Sequence[KitModel], folder: Path) -> JsonObject:
    """What manifest.json says: what there is, and of every other file its size and SHA-256."""
    contents = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {
        **described(models),
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
    }


def described(models: Sequence[KitModel]) -> JsonObject:
    """What the manifest of a kit with these models says beside its files."""
    return {
        "version": VERSION,
        "seed": SEED,
        "tolerance": TOLERANCE,
        "models": [
            {
                "name": model.name,
                "architecture": model.model_type,
                "tokens": tokens_of(model.name, model.config["vocab_size"]).tolist(),
                "goldens": [golden._asdict() for golden in goldens_of(model)],
            }
            for model in models
        ],
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
