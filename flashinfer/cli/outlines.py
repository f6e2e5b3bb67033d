"""A model that is not here as a bundle, as one without weights, which can be planned."""

import contextlib
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashinfer.formats import bounded_json
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.convert import convert, outline
from flashinfer.formats.errors import FormatError, UserError, reason
from flashinfer.formats.files import read_bytes, scratch_directory
from flashinfer.formats.sources.gguf import is_gguf
from flashinfer.formats.sources.hub import (
    address_of,
    fetch,
    gguf_file,
    names_a_gguf_file,
    names_a_repository,
)
from flashinfer.formats.sources.split_gguf import MOST_FILES, open_gguf
from flashinfer.formats.sources.split_gguf import NAME as SPLIT
from flashinfer.plan.companion import companion_of
from flashinfer.synth.shapes import config_like

CONFIG = "config.json"
GGUF_HEADER = 64 << 20  # bytes of a remote GGUF file that are fetched, for its header
PAGE_OF_HUB = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)(?:/tree/[^/]+)?/?")
MOST_CONFIG = 4 << 20  # bytes
SECONDS = 30.0  # to wait for a server


@contextmanager
def to_plan(
    model: str | None, like: str | None, dtype: str | None, dense_dtype: str | None
) -> Iterator[tuple[Path, int | None]]:
    """(the path of a bundle: ``model`` where it is one, else that of an outline, for a while; the
    bytes of a GGUF file, 0 of another model that is no bundle, of a bundle None).

    model  besides a bundle a config.json, a directory with one, a GGUF file, a name or page on the
           Hugging Face Hub, or the address of a config.json or a GGUF file
    like   the name of a published shape, in place of a model
    Of a GGUF file each tensor has its own number format, unless ``dtype`` says otherwise, and it is
    planned with the companion beside it, where there is one.
    Raises UserError where neither or both are given, or what is named cannot be had; FormatError
    where it is not sound or not supported.
    """
    if (model is None) == (like is None):
        raise UserError("give either a model or --like NAME")
    if model is not None and _is_bundle(model):
        yield Path(model), None
        return
    if model is not None and dtype is dense_dtype is None and (made := companion_of(model)):
        yield made, None  # what calibration found is there
        return
    with _scratch() as folder:
        path, source = folder / "outline.flash", 0
        if like is not None:
            outline(config_like(like), path, dtype, dense_dtype)
        else:
            assert model is not None
            source = _write(model, path, dtype, dense_dtype)
        yield path, source


@contextmanager
def _scratch() -> Iterator[Path]:
    """A directory for an outline: here, as the device that is planned for where none is named is
    that of the file; or where nothing can be written here, anywhere."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_directory(Path.cwd(), "outline"))
        except OSError:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield folder


def _is_bundle(model: str) -> bool:
    """Whether this is to be opened as a bundle, which says what is wrong where it is none."""
    path = Path(model)
    if path.is_dir() or path.suffix == ".json" or is_gguf(path):
        return False
    return not (_is_address(model) or names_a_repository(model) or names_a_gguf_file(model))


def _is_address(model: str) -> bool:
    return model.startswith(("https://", "http://"))


def _write(model: str, path: Path, dtype: str | None, dense_dtype: str | None) -> int:
    """Write the outline of a model to ``path``; returns the bytes of its GGUF files, or 0."""
    page = PAGE_OF_HUB.fullmatch(model)
    if page is not None:
        model = page[1]
    if names_a_gguf_file(model):
        model = address_of(*gguf_file(model))
    if _is_address(model) and not model.partition("?")[0].endswith(".json"):
        header = _fetch_headers(model, path.parent)
        try:
            convert(header, path, dtype, dense_dtype=dense_dtype, outline=True)
        except (FormatError, UserError) as error:
            raise type(error)(str(error).replace(str(header), model)) from None
        return _size_of(header)
    if is_gguf(model):
        convert(model, path, dtype, dense_dtype=dense_dtype, outline=True)
        return _size_of(model)
    config, named = _config(model)
    try:
        outline(config, path, dtype, dense_dtype)
    except FormatError as error:
        raise FormatError(f"{named}: {error}") from None
    return 0


def _size_of(path: Path | str) -> int:
    """The bytes of a GGUF file, or of all files of a model in several."""
    file = open_gguf(path)
    try:
        return file.size
    finally:
        file.close()


def _config(model: str) -> tuple[JsonObject, str]:
    """(the config of a model, the name of the file that it is in)."""
    if _is_address(model):
        with _answer(model) as answer:
            name, text = model, answer.read(MOST_CONFIG)
    else:
        if names_a_repository(model):
            path = fetch(model, weights=()) / CONFIG
        else:
            path = Path(model) / CONFIG if Path(model).is_dir() else Path(model)
        name, text = str(path), read_bytes(path, MOST_CONFIG)
    config = bounded_json.parse(text, name)
    if not isinstance(config, dict):
        raise FormatError(f"{name}: is not the config of a model")
    return config, name


def _fetch_headers(address: str, folder: Path) -> Path:
    """The path of a GGUF file on a server, of which there are the headers only; of a model in
    several files, of the first."""
    base, _, name = address.partition("?")[0].rpartition("/")
    split = SPLIT.fullmatch(name)
    count = int(split[3]) if split is not None else 1
    if split is None or not 1 < count <= MOST_FILES:
        _fetch_header(address, folder / "model.gguf")
        return folder / "model.gguf"
    for number in range(1, count + 1):
        part = f"{split[1]}-{number:05}-of-{split[3]}.gguf"
        _fetch_header(f"{base}/{part}", folder / part)
    return folder / name


def _fetch_header(address: str, path: Path) -> None:
    """A GGUF file on a server, of which only the header is fetched: the rest is a hole."""
    with _answer(address, GGUF_HEADER) as answer, open(path, "wb") as file:
        total = re.fullmatch(r"bytes 0-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        size = int(total[1]) if total else int(answer.headers.get("Content-Length") or 0)
        left = GGUF_HEADER
        while left and (part := answer.read(min(left, 1 << 20))):
            left -= len(part)
            file.write(part)
        file.truncate(max(size, file.tell()))


@contextmanager
def _answer(address: str, first: int | None = None) -> Iterator[Any]:
    """What a server answers; first: that many bytes are wanted. Raises UserError."""
    headers = {"User-Agent": "flashinfer"}
    if first is not None:
        headers["Range"] = f"bytes=0-{first - 1}"
    try:
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            yield answer
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise UserError(f"{address}: cannot be fetched: {reason(error)}") from None
