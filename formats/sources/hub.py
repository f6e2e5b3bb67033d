"""Fetching a checkpoint from the Hugging Face Hub (needs ``huggingface_hub``)."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..arrays import Float32Array, UInt8Array
from ..errors import UserError, reason
from .checkpoint import Checkpoint
from .shards import SafetensorsShard, shard_names

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
GGUF = re.compile(rf"({NAME.pattern}):([\w.-]+)")
LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
SMALL = ["*.json", "tokenizer.model", "merges.txt", "*.jinja"]
# Weights as safetensors where the repository has them, else as PyTorch's.
WEIGHTS = (["*.safetensors"], ["pytorch_model*.bin"])


def names_a_repository(source: Path | str) -> bool:
    """Whether ``source`` is not a path here, but looks like ``org/name``."""
    return not Path(source).exists() and NAME.fullmatch(str(source)) is not None


def names_a_gguf_file(source: Path | str) -> bool:
    """Whether ``source`` is not a path here, but looks like ``org/name:Q4_K_M``: the GGUF file of a
    repository with this in its name."""
    return not Path(source).exists() and GGUF.fullmatch(str(source)) is not None


def gguf_file(source: Path | str) -> tuple[str, str]:
    """(repository, file) that ``org/name:Q4_K_M`` names; of a model in several files the first.

    Raises UserError where there is none or more than one, or the library is missing.
    """
    named = GGUF.fullmatch(str(source))
    assert named is not None
    hub = _library(source)
    with _one_line(source):
        siblings = hub.HfApi().model_info(named[1]).siblings or ()
    files = [file.rfilename for file in siblings if file.rfilename.endswith(".gguf")]
    tag = named[2].lower()
    found = [f for f in files if tag in f.lower() and not LATER_PART.search(f)]
    # Q4_K would be in Q4_K_M, too.
    exact = [f for f in found if re.search(rf"(^|[-._/]){re.escape(tag)}([-.]|$)", f.lower())]
    found = exact if len(exact) == 1 else found
    if len(found) != 1:
        names = ", ".join(sorted(found or files)[:8]) or "none"
        raise UserError(f"{source}: names {len(found)} GGUF files; the repository has {names}")
    return named[1], found[0]


def fetch_gguf(source: Path | str) -> Path:
    """The path of the GGUF file that ``org/name:Q4_K_M`` names; missing files are downloaded.

    Raises UserError as ``gguf_file`` and ``fetch`` do.
    """
    repository, first = gguf_file(source)
    parts = re.sub(r"-00001-of-(\d{5})\.gguf$", r"-*-of-\1.gguf", first)
    with _one_line(source):
        folder = _library(source).snapshot_download(repository, allow_patterns=[first, parts])
    return Path(folder, first)


def address_of(repository: str, file: str) -> str:
    """Where a file of the Hub can be read."""
    return str(_library(repository).hf_hub_url(repository, file))


def fetch(name: Path | str, weights: Sequence[list[str]] = WEIGHTS) -> Path:
    """The directory that holds the checkpoint ``org/name``; missing files are downloaded.

    weights  patterns of files of weights; those of the first list that matches any are downloaded
    Raises UserError where the library is missing, or the download fails.
    """
    hub = _library(name)
    with _one_line(name):
        for patterns in weights or [[]]:
            folder = hub.snapshot_download(
                name, allow_patterns=[*SMALL, *patterns], ignore_patterns=["*/*"]
            )
            if any(any(Path(folder).glob(pattern)) for pattern in patterns):
                break
    return Path(folder)


def lean_checkpoint(name: Path | str, folder: Path) -> Checkpoint:
    """The Checkpoint ``org/name`` whose shards are downloaded one by one.

    Each HubShard is downloaded to ``folder`` when it is first read, and deleted by its ``drop``.
    Raises UserError as ``fetch`` does.
    """
    small = fetch(name, weights=())
    index = small / "model.safetensors.index.json"
    files = shard_names(index) if index.exists() else ["model.safetensors"]
    return Checkpoint(small, [HubShard(name, file, folder) for file in files])


class HubShard:
    """A Shard of safetensors on the Hub; only its header is read before it is downloaded."""

    def __init__(self, repository: Path | str, name: str, folder: Path) -> None:
        self.repository, self.name, self.folder = str(repository), name, folder
        self.here: SafetensorsShard | None = None
        with _one_line(repository):
            header = _library(repository).HfApi().parse_safetensors_file_metadata(repository, name)
        self.tensors = header.tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(info.shape) for name, info in self.tensors.items()}

    def dtype(self, name: str) -> str:
        return str(self.tensors[name].dtype)

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32Array:
        return self._fetched().read_rows(name, start, stop)

    def read_bytes(self, name: str, start: int, stop: int) -> UInt8Array:
        return self._fetched().read_bytes(name, start, stop)

    def read_columns(self, name: str) -> Iterator[Float32Array]:
        return self._fetched().read_columns(name)

    def _fetched(self) -> SafetensorsShard:
        if self.here is None:
            with _one_line(self.repository):
                path = _library(self.repository).hf_hub_download(
                    self.repository, self.name, local_dir=self.folder
                )
            self.here = SafetensorsShard(path)
        return self.here

    def drop(self) -> None:
        """Delete the downloaded file. Called when nothing more will be read from it."""
        if self.here is not None:
            self.close()
            self.here = None
            Path(self.folder, self.name).unlink()

    def close(self) -> None:
        if self.here is not None:
            self.here.close()


def _library(name: Path | str) -> Any:
    """The module huggingface_hub. Raises UserError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name}: no such directory; to fetch it from the Hugging Face Hub: "
            "pip install 'llm-in-a-flash[hub]'"
        ) from None
    return huggingface_hub


@contextmanager
def _one_line(name: Path | str) -> Iterator[None]:
    """Turn any exception of the library, the network below it or the disk into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{name}: cannot be fetched from the Hugging Face Hub: {reason(error)}"
        ) from None
