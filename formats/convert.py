"""From a Hugging Face checkpoint or a GGUF file to a flat bundle, a piece at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from . import bitnet
from .architectures import model_config
from .architectures.wrappers import text_config
from .arrays import UInt8Array
from .bounded_json import JsonObject
from .bundle.in_place import InPlace, Placed, refuse_apart, source_file
from .bundle.layout import TEMPLATE, TOKENIZER, bundles_name, format_of, layout
from .bundle.writer import NewTensor, byte_tensor, new_tensor, write_bundle
from .errors import FormatError, UserError
from .files import refuse_loss, refuse_target, scratch_directory
from .number_formats import Matrices, NumberFormat, number_format
from .progress import Progress, no_progress
from .sources.checkpoint import Checkpoint
from .sources.gguf import is_gguf
from .sources.gguf_checkpoint import GgufCheckpoint
from .sources.hub import (
    HubShard,
    fetch,
    fetch_gguf,
    lean_checkpoint,
    names_a_gguf_file,
    names_a_repository,
)
from .sources.names import Names
from .tensors import ATTENTION, EMBEDDING, FFN


def convert(
    source: Path | str,
    destination: Path | str,
    dtype: str | None = None,
    progress: Progress = no_progress,
    dense_dtype: str | None = None,
    activation: str | None = None,
    low_disk: bool = False,
    note: Callable[[str], None] = lambda line: None,
    outline: bool = False,
    in_place: bool = False,
) -> int:
    """Convert a checkpoint to the bundle ``destination``; return its size in bytes.

    source       the directory of a Hugging Face checkpoint, its name on the Hub, or a GGUF file (of
                 several the first), also as "org/name:Q4_K_M" on the Hub
    dtype        number format of the weights; norms and biases are always f32. None: f16; of a
                 GGUF file each tensor's own, or the nearest to it
    progress     is told the bytes written, as "write"
    dense_dtype  number format of the weights that are not FFN; None: ``dtype``
    activation   the FFN's activation, such as "relu"; only for a GGUF file, which does not state it
    low_disk     of a checkpoint on the Hub: download shard by shard, to a directory beside
                 ``destination``, and delete each shard when it is converted
    note         is called with a line about each part of the checkpoint that is left out, such as
                 a GGUF file's tokenizer that is damaged or of an unknown kind
    outline      read and write no weights: see ``write_bundle``
    in_place     of a GGUF file: leave the weights in it that it has as a bundle would have them,
                 and write what is left; ``destination`` lies beside it

    Memory: the largest FFN matrix in the checkpoint's own format, some tens of MB, and up to 1 GiB
    for the tokenizer's JSON. Raises FormatError where the checkpoint is not sound or not supported,
    UserError where the destination cannot be written.
    """
    refuse_loss(destination, [source])
    refuse_target(destination)
    if in_place:
        _refuse_others(source, dtype or dense_dtype)
        refuse_apart(destination, Path(source))
    with (
        _opened(source, activation, low_disk, Path(destination)) as checkpoint,
        np.errstate(over="ignore", invalid="ignore"),  # weights that are not finite stay so
    ):
        try:
            config = model_config(checkpoint.config)
        except FormatError as error:
            raise FormatError(f"{checkpoint.config_path}: {error}") from None
        if isinstance(checkpoint, Checkpoint) and checkpoint.wrapper:
            note(
                f"{source}: of {checkpoint.model_type} its text, "
                f"{checkpoint.config['model_type']}, is converted; what sees images is left out "
                f"(tensors: {checkpoint.not_text})"
            )
        names = Names(checkpoint, config)
        if names.left_out:
            note(
                f"{source}: layers after the last, which predict further tokens, are left out "
                f"(tensors: {len(names.left_out)})"
            )
        if dtype is None:
            names.keep_matrices()
        tensors = _tensors(names, dtype, dense_dtype, _texts(checkpoint, note))
        if dtype is None:
            _note_rounded(names, note)
        left: InPlace | None = None
        if in_place and isinstance(checkpoint, GgufCheckpoint):
            tensors, left = _left_in_place(tensors, checkpoint)
        order: list[str] = []
        if low_disk and isinstance(checkpoint, Checkpoint):
            tensors, order = _shard_by_shard(tensors, names.sources, checkpoint)
        return write_bundle(
            destination,
            tensors,
            hugging_face_config(checkpoint),
            source={"checkpoint": Path(source).name or Path(source).resolve().name},
            progress=progress,
            order=order,
            outline=outline,
            in_place=left,
        )


def _refuse_others(source: Path | str, dtype: str | None) -> None:
    """Raise UserError where a source's weights cannot be left as they are."""
    if not is_gguf(source):
        raise UserError(f"{source}: --in-place is for GGUF files, which have weights as bundles do")
    if dtype:
        raise UserError(f"{source}: --in-place leaves weights as they are; leave --dtype away")


def _left_in_place(
    tensors: list[NewTensor], checkpoint: GgufCheckpoint
) -> tuple[list[NewTensor], InPlace]:
    """(the tensors to write, what stays where it lies). Raises UserError where no feed-forward
    network stays."""
    stay = {
        tensor.name: Placed(tensor.format or tensor.dtype.lower(), tensor.lies)
        for tensor in tensors
        if tensor.lies is not None
    }
    if not any(name.endswith(".ffn.bundles") for name in stay):
        raise UserError(
            f"{checkpoint.directory}: none of its feed-forward networks can be read where it lies: "
            "its neurons are read one by one, or it is in formats that are requantised; "
            "flashinfer convert without --in-place makes a bundle of it"
        )
    files = tuple(source_file(file.path) for file in checkpoint.file.files)
    return [tensor for tensor in tensors if tensor.name not in stay], InPlace(files, stay)


def outline(
    config: JsonObject,
    destination: Path | str,
    dtype: str | None = None,
    dense_dtype: str | None = None,
) -> int:
    """Write what ``convert`` would make of a checkpoint with this config, without its weights and
    texts; return the size in bytes that it would have. dtype, dense_dtype: as ``convert``'s.

    Raises FormatError where the config is not sound or not supported, UserError where the
    destination cannot be written.
    """
    config = text_config(config)
    described, of_bitnet = model_config(config), bitnet.of_config(config) is not None

    def chosen(name: str | None, shape: tuple[int, int]) -> NumberFormat:
        """The format called ``name``, or where that is None the one that ``convert`` takes."""
        if name is None and of_bitnet:
            return bitnet.format_of(shape)
        return number_format(name or "f16")

    formats = {
        bundles_name(number): Matrices(shapes, [chosen(dtype, shape) for shape in shapes.values()])
        for number, layer in enumerate(described.layers)
        if layer.ffn.matrices and (shapes := layer.ffn.matrix_shapes())
    }
    of_neurons, tensors = chosen(dtype, (1, described.hidden_size)), []
    for spec in layout(described):
        dense = dense_dtype or dtype
        if spec.role == ATTENTION:
            rows, columns = spec.shape
            own = chosen(dense, (rows, columns))
        else:
            own = number_format(dense or "f16")
        format = formats.get(spec.name) or format_of(spec, of_neurons, own)
        tensors.append(new_tensor(spec.name, format, spec.shape, lambda: ()))
    return write_bundle(destination, tensors, config, source={}, outline=True)


def _note_rounded(names: Names, note: Callable[[str], None]) -> None:
    """Say what of a GGUF file, whose number formats are kept, is not kept bit for bit."""
    checkpoint = names.checkpoint
    if not isinstance(checkpoint, GgufCheckpoint):
        return
    for kind in checkpoint.requantised():
        note(f"{kind} is requantised as q4_K, as no number format here keeps it")
    downs = (  # missing where the file has it transposed
        names.ffn(number).get("down", "").format(names.number("layers.{}.ffn.down", number))
        for number, layer in enumerate(names.config.layers)
        if not layer.ffn.matrices and layer.ffn.neurons
    )
    if any(down and checkpoint.format_of(down).block > 1 for down in downs):
        note("the down projections' blocks lie across neurons there, and were made anew")


def _tensors(
    names: Names,
    dtype: str | None,
    dense_dtype: str | None,
    texts: dict[str, str],
) -> list[NewTensor]:
    """The tensors of the bundle, in file order; the texts come before the largest weights."""
    specs, dense_dtype = layout(names.config), dense_dtype or dtype
    ffn = number_format(dtype) if dtype else None
    dense = number_format(dense_dtype) if dense_dtype else None
    tensors = [names.tensor(spec, ffn, dense) for spec in specs]
    names.refuse_strangers()
    first = next(i for i, spec in enumerate(specs) if spec.role in (EMBEDDING, FFN))
    for name, text in texts.items():
        tensors.insert(first, byte_tensor(name, text.encode("utf-8")))
    return tensors


def _texts(checkpoint: Checkpoint | GgufCheckpoint, note: Callable[[str], None]) -> dict[str, str]:
    """{TOKENIZER, TEMPLATE: its text}, without those that the checkpoint lacks."""
    texts = {TOKENIZER: _tokenizer(checkpoint, note), TEMPLATE: checkpoint.chat_template()}
    return {name: text for name, text in texts.items() if text is not None}


def _tokenizer(checkpoint: Checkpoint | GgufCheckpoint, note: Callable[[str], None]) -> str | None:
    """The text of the tokenizer.json, or None. A GGUF file is converted even without it."""
    try:
        return checkpoint.tokenizer_json()
    except FormatError as error:
        if not isinstance(checkpoint, GgufCheckpoint):
            raise
        note(f"{error}; converted without its tokenizer, for token ids (--tokens) only")
        return None


def hugging_face_config(checkpoint: Checkpoint | GgufCheckpoint) -> JsonObject:
    """The checkpoint's config, with what its generation config and tokenizer add to it."""
    hf_config = dict(checkpoint.config)
    generation = checkpoint.generation_config()
    if "eos_token_id" in generation:
        hf_config["eos_token_id"] = generation["eos_token_id"]
    if named := checkpoint.special_tokens():
        hf_config["special_tokens_map"] = named
    return hf_config


@contextmanager
def _opened(
    source: Path | str, activation: str | None, low_disk: bool, destination: Path
) -> Iterator[Checkpoint | GgufCheckpoint]:
    if not low_disk:
        with open_checkpoint(source, activation) as checkpoint:
            yield checkpoint
        return
    if not names_a_repository(source) or activation is not None:
        raise UserError(f"{source}: --low-disk is for checkpoints on the Hub, given as org/name")
    with (
        scratch_directory(destination.parent, destination.name) as folder,
        lean_checkpoint(source, folder) as checkpoint,
    ):
        yield checkpoint


def _shard_by_shard(
    tensors: list[NewTensor], sources: dict[str, list[str]], checkpoint: Checkpoint
) -> tuple[list[NewTensor], list[str]]:
    """(tensors, the order to make them in) so that the shards are read one after the other.

    sources  {tensor: names of those in the checkpoint that it is made of}
    Making the last tensor that needs a shard drops the shard.
    """
    number = {id(shard): i for i, shard in enumerate(checkpoint.shards)}
    needs = {
        tensor.name: {
            number[id(shard)]
            for name in sources.get(tensor.name, ())
            for shard in checkpoint.shards_of(name)
        }
        for tensor in tensors
    }
    order = sorted(needs, key=lambda name: max(needs[name], default=-1))
    last_user = {i: name for name in order for i in needs[name]}

    def dropping(tensor: NewTensor) -> NewTensor:
        done = [checkpoint.shards[i] for i, name in last_user.items() if name == tensor.name]

        def chunks() -> Iterator[UInt8Array | bytes]:
            yield from tensor.chunks()
            for shard in done:
                if isinstance(shard, HubShard):
                    shard.drop()

        return replace(tensor, chunks=chunks)

    return [dropping(tensor) for tensor in tensors], order


def open_checkpoint(
    source: Path | str, activation: str | None = None
) -> Checkpoint | GgufCheckpoint:
    """The checkpoint at ``source``: a directory, a name on the Hub, or a GGUF file.

    activation  see ``convert``
    Raises UserError.
    """
    if names_a_gguf_file(source):
        source = fetch_gguf(source)
    if is_gguf(source):
        return GgufCheckpoint(source, activation)
    if activation is not None:
        raise UserError(f"{source}: its config states the activation; only GGUF files do not")
    return Checkpoint(fetch(source) if names_a_repository(source) else source)
