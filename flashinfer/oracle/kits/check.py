"""Checking a written kit: every hash, and that our engine gives what the kit says is right."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import numpy as np

from flashinfer import kernels
from flashinfer.formats.bounded_json import JsonObject, read_json
from flashinfer.formats.errors import FormatError, shown
from flashinfer.formats.files import read_bytes
from flashinfer.formats.number_formats import FORMATS
from flashinfer.formats.numbers import is_whole
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.formats.safetensors import SafetensorsFile
from flashinfer.oracle.kits import number_formats, texts
from flashinfer.oracle.kits.configs import MODELS, KitModel
from flashinfer.oracle.kits.draws import VERSION
from flashinfer.oracle.kits.golden import write_golden
from flashinfer.oracle.kits.kit import (
    MANIFEST,
    TOLERANCE,
    Golden,
    described,
    goldens_of,
    other_files,
)
from flashinfer.text.tokenizer import Tokenizer

MOST_FILE = 2 << 20  # bytes; no file of a kit is larger
MOST_FILES = 10_000


@dataclass
class Checked:
    """What was found out about a kit.

    version        of the kit
    files, models  how many were checked
    differences    a line about each thing that is not as the kit says
    not_checked    a line about each part that was left out, and why
    """

    version: int = VERSION
    files: int = 0
    models: int = 0
    differences: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)


def check_kit(directory: Path | str, progress: Progress = no_progress) -> Checked:
    """Check the kit in ``directory``.

    progress  is told the models done, as "kit"
    What our engine gives is compared where every hash is right. With the compiled kernels it has
    to be the same to the last bit, with those in NumPy logits may differ by TOLERANCE. Raises
    FormatError where the directory holds no kit, or one of another version.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    files = manifest.pop("files")
    models = [m for m in MODELS if f"models/{m.name}/config.json" in files]
    found = Checked(files=len(files))
    if manifest != described(models):
        found.differences.append(
            f"{folder / MANIFEST}: its models, tokens or tolerance are not version {VERSION}'s"
        )
    found.differences += _missing(folder, files, models)
    found.differences += _wrong_hashes(folder, files)
    if found.differences:
        found.not_checked.append("what our engine gives, as files differ")
        return found
    with tempfile.TemporaryDirectory() as scratch:
        for number, model in enumerate(models):
            found.differences += _wrong_model(model, folder, Path(scratch))
            progress("kit", number + 1, len(models))
    found.models = len(models)
    found.differences += _other_parts(folder)
    for name in number_formats.NAMES:
        found.differences += _wrong_products(name)
    if find_spec("tokenizers") is None or find_spec("jinja2") is None:
        found.not_checked.append(
            "tokenizers and chat templates, which need pip install 'llm-in-a-flash[text]'"
        )
    else:
        found.differences += _wrong_texts(folder)
    return found


def read_manifest(folder: Path) -> JsonObject:
    """A kit's manifest, whose "files" are sound. Raises FormatError."""
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.get("version") != VERSION:
        raise FormatError(
            f"{path}: is of a kit of version {shown(manifest.get('version'))}; this flashinfer "
            f"checks version {VERSION}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not 0 < len(files) <= MOST_FILES:
        raise FormatError(f"{path}: files is not an object of up to {MOST_FILES} files")
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        inside = bool(parts) and ".." not in parts and not name.startswith("/")
        sound = isinstance(entry, dict) and is_whole(entry.get("bytes"), 0, MOST_FILE)
        if not inside or not sound or not isinstance(entry.get("sha256"), str):
            raise FormatError(
                f"{path}: the entry {shown(name)} of files is not the size, of at most "
                f"{MOST_FILE:,} bytes, and the SHA-256 of a file in the kit"
            )
    return manifest


def _missing(folder: Path, files: JsonObject, models: list[KitModel]) -> Iterator[str]:
    """What of a kit with these models its manifest does not list."""
    needed = [name for name, _ in other_files()]
    for model in models:
        checkpoint, *gguf = goldens_of(model)
        needed.append(f"{checkpoint.source}/model.safetensors")
        needed += [path for golden in gguf for path in golden]
        needed += [checkpoint.logits, checkpoint.trace]
    for name in needed:
        if name not in files:
            yield f"{folder / MANIFEST}: does not list {name}"


def _wrong_hashes(folder: Path, files: JsonObject) -> Iterator[str]:
    for name, entry in files.items():
        try:
            content = read_bytes(folder / name, MOST_FILE)
        except FormatError as error:
            yield str(error)
            continue
        if len(content) != entry["bytes"]:
            yield f"{folder / name}: has {len(content)} bytes, the kit's has {entry['bytes']}"
        elif hashlib.sha256(content).hexdigest() != entry["sha256"]:
            yield f"{folder / name}: its SHA-256 is not the one of the manifest"


def _wrong_model(model: KitModel, folder: Path, scratch: Path) -> Iterator[str]:
    logits, trace = scratch / "logits.safetensors", scratch / "trace.safetensors"
    for golden in goldens_of(model):
        write_golden(folder / golden.source, model.name, logits, trace, scratch)
        difference = _largest_difference(logits, folder / golden.logits)
        if not difference <= TOLERANCE:
            yield (
                f"{folder / golden.source}: our logits differ from the kit's by {difference:.1e}, "
                f"more than {TOLERANCE}"
            )
        elif kernels.in_use == "native":
            yield from _other_bits(golden, folder, logits, trace)


def _other_bits(golden: Golden, folder: Path, logits: Path, trace: Path) -> Iterator[str]:
    for ours, theirs in ((logits, golden.logits), (trace, golden.trace)):
        if ours.read_bytes() != read_bytes(folder / theirs, MOST_FILE):
            yield f"{folder / theirs}: our engine's has other bits"


def _largest_difference(ours: Path, theirs: Path) -> float:
    """Largest absolute difference of a logit; infinite where the shapes differ."""
    with SafetensorsFile(ours) as a, SafetensorsFile(theirs) as b:
        if "logits" not in b.tensors or a.tensors["logits"].shape != b.tensors["logits"].shape:
            return float("inf")
        return float(np.abs(a.read_rows("logits") - b.read_rows("logits")).max())


def _other_parts(folder: Path) -> Iterator[str]:
    """What of the parts that are no models is not what this version writes."""
    for name, content in other_files():
        if read_bytes(folder / name, MOST_FILE) != content:
            yield f"{folder / name}: is not what this flashinfer gives"


def _wrong_products(name: str) -> Iterator[str]:
    """Products by the kernels in use that are too far from the exact ones."""
    if name == "mxfp4":  # as checkpoints have it, which is decoded and never multiplied with
        return
    format, tensors = FORMATS[name], number_formats.tensors_of(name)
    matrix = kernels.Matrix(tensors["rows"], tensors["values"].shape[1], format)
    with np.errstate(over="ignore", invalid="ignore"):
        products = kernels.linear(tensors["vector"][None], matrix)[0]
    # With blocks the vector is rounded to 8 bits, as in GGML.
    allowed = (1e-6 if format.block == 1 else 1e-2) * tensors["magnitudes"]
    fits = tensors["magnitudes"] < np.finfo(np.float32).max
    if not (np.abs(products - tensors["products"]) <= allowed)[fits].all():
        yield f"products of rows in {name} and a vector are too far from the exact ones"


class TokenizerJson:
    """A ``tokenizer.json``: a TokenizerFile that is all tokenizer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def where(self, name: str) -> tuple[int, int]:
        """(0, bytes of the file)."""
        return 0, self.path.stat().st_size


def _wrong_texts(folder: Path) -> Iterator[str]:
    for name in texts.TOKENIZERS:
        tokenizer = _tokenizer(folder, name)
        for case in texts.tokenizer_cases(name):
            if tokenizer.encode(case["text"]) != case["ids"]:
                yield f"tokenizer {name}: the text {shown(case['text'])} has other ids"
        tokenizer.close()
    tokenizer = _tokenizer(folder, texts.CHAT_TOKENIZER)
    for name, template in texts.TEMPLATES.items():
        tokenizer.use_template(template)
        for number, case in enumerate(texts.chat_cases(name)):
            if _rendered(tokenizer, case) != tokenizer.encode(case["text"], special=False):
                yield f"chat template {name}: conversation {number} gives another text"
    tokenizer.close()


def _tokenizer(folder: Path, name: str) -> Tokenizer:
    return Tokenizer(TokenizerJson(folder / "tokenizers" / name / "tokenizer.json"))


def _rendered(tokenizer: Tokenizer, case: JsonObject) -> list[int]:
    """The token ids of the text of a conversation."""
    bos, eos = texts.SPECIAL
    messages = json.dumps(case["messages"]).encode()
    return tokenizer.ask(
        "render", messages, len(messages), special={"bos_token": bos, "eos_token": eos},
        characters_at_most=MOST_FILE,
    )["ids"]  # fmt: skip
