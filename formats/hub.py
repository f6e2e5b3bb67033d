"""Fetching a checkpoint from the Hugging Face Hub (needs ``huggingface_hub``)."""

import re
from pathlib import Path

from .errors import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Weights as safetensors where there are any, and the small files beside them.
SMALL = ["*.json", "tokenizer.model", "merges.txt", "*.jinja"]
WEIGHTS = (["*.safetensors"], ["pytorch_model*.bin"])


def names_a_repository(source):
    """Whether ``source`` is no path here, but looks like ``org/name``."""
    return not Path(source).exists() and NAME.fullmatch(str(source)) is not None


def fetch(name):
    """The directory that holds the checkpoint ``org/name``, fetched where it is not here yet.

    Raises UserError where the library is missing, or the checkpoint cannot be had.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name}: no such directory; to fetch it from the Hugging Face Hub: "
            "pip install 'flashinfer[hub]'"
        ) from None
    try:
        for weights in WEIGHTS:
            folder = huggingface_hub.snapshot_download(
                name, allow_patterns=[*SMALL, *weights], ignore_patterns=["*/*"]
            )
            if any(any(Path(folder).glob(pattern)) for pattern in weights):
                break
    except Exception as error:  # of the library, of the network below it, of the disk
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{name}: cannot be fetched from the Hugging Face Hub: {reason}") from None
    return Path(folder)
