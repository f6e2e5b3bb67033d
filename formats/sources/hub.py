"""Fetching a checkpoint from the Hugging Face Hub (needs ``huggingface_hub``)."""

import re
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError, reason
from .checkpoint import Checkpoint, SafetensorsShard, shard_names

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Weights as safetensors where there are any, and the small files beside them.
SMALL = ["*.json", "tokenizer.model", "merges.txt", "*.jinja"]
WEIGHTS = (["*.safetensors"], ["pytorch_model*.bin"])


def names_a_repository(source):
    """Whether ``source`` is no path here, but looks like ``org/name``."""
    return not Path(source).exists() and NAME.fullmatch(str(source)) is not None


def fetch(name, weights=WEIGHTS):
    """The directory that holds the checkpoint ``org/name``, fetched where it is not here yet.

    weights  patterns of its files of weights, of which the first that are there are fetched, too
    Raises UserError where the library is missing, or the checkpoint cannot be had.
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


def lean_checkpoint(name, folder):
    """The Checkpoint ``org/name``, of which each shard is fetched to ``folder`` when it is first
    read, and deleted by its ``drop``. Raises UserError as ``fetch``."""
    small = fetch(name, weights=())
    index = small / "model.safetensors.index.json"
    files = shard_names(index) if index.exists() else ["model.safetensors"]
    return Checkpoint(small, [HubShard(name, file, folder) for file in files])


class HubShard:
    """A safetensors shard on the Hub; its header alone is read before it is fetched."""

    def __init__(self, repository, name, folder):
        self.repository, self.name, self.folder, self.here = repository, name, folder, None
        with _one_line(repository):
            header = _library(repository).HfApi().parse_safetensors_file_metadata(repository, name)
        self.tensors = header.tensors

    def shapes(self):
        return {name: tuple(info.shape) for name, info in self.tensors.items()}

    def dtype(self, name):
        return self.tensors[name].dtype

    def read_rows(self, *arguments):
        return self._fetched().read_rows(*arguments)

    def read_bytes(self, *arguments):
        return self._fetched().read_bytes(*arguments)

    def read_columns(self, name):
        return self._fetched().read_columns(name)

    def _fetched(self):
        if self.here is None:
            with _one_line(self.repository):
                path = _library(self.repository).hf_hub_download(
                    self.repository, self.name, local_dir=self.folder
                )
            self.here = SafetensorsShard(path)
        return self.here

    def drop(self):
        """Nothing more will be read from it: its file is deleted."""
        if self.here is not None:
            self.close()
            self.here = None
            Path(self.folder, self.name).unlink()

    def close(self):
        if self.here is not None:
            self.here.close()


def _library(name):
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name}: no such directory; to fetch it from the Hugging Face Hub: "
            "pip install 'llm-in-a-flash[hub]'"
        ) from None
    return huggingface_hub


@contextmanager
def _one_line(name):
    """What fails in the library, in the network below it or on the disk becomes a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{name}: cannot be fetched from the Hugging Face Hub: {reason(error)}"
        ) from None
