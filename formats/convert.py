"""From a Hugging Face checkpoint or a GGUF file to a flat bundle, a piece at a time."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .architectures import model_config
from .bundle.layout import EMBEDDING, FFN, TEMPLATE, TOKENIZER, layout
from .bundle.writer import byte_tensor, write_bundle
from .errors import FormatError, UserError
from .files import refuse_loss, refuse_target, scratch_directory
from .number_formats import number_format
from .sources.checkpoint import Checkpoint
from .sources.gguf import is_gguf
from .sources.gguf_checkpoint import GgufCheckpoint
from .sources.hub import fetch, lean_checkpoint, names_a_repository
from .sources.names import Names


def convert(
    source, destination, dtype=None, progress=None, dense_dtype=None, activation=None,
    low_disk=False, note=lambda line: None,
):  # fmt: skip
    """Convert a checkpoint to the bundle ``destination``.

    source       the directory of a Hugging Face checkpoint, its name on the Hub, or a GGUF file
    dtype        number format of the weights; norms and biases are always f32. None: f16; of a
                 GGUF file, the one that each tensor has there, or the nearest to it
    progress     called as progress(bytes_written, bytes_in_all)
    dense_dtype  number format of what is not FFN, where it is to be another
    activation   of a GGUF file, which does not say it: the FFN's, such as "relu"
    low_disk     of a checkpoint on the Hub: fetch shard by shard, and delete each when it is
                 converted; meanwhile they lie beside ``destination``
    note         called with a line on what of the checkpoint is left out: a GGUF file's tokenizer,
                 where it is damaged or not known

    Returns the size in bytes. Memory: the largest FFN matrix in the checkpoint's own format, some
    tens of MB, and what the tokenizer's JSON takes, up to 1 GiB. Raises FormatError where the
    checkpoint is not sound or not supported.
    """
    refuse_loss(destination, [source])
    refuse_target(destination)
    with _opened(source, activation, low_disk, Path(destination)) as checkpoint:
        try:
            config = model_config(checkpoint.config)
        except FormatError as error:
            raise FormatError(f"{checkpoint.config_path}: {error}") from None
        if dtype is None and not isinstance(checkpoint, GgufCheckpoint):
            dtype = "f16"
        ffn, dense = (name and number_format(name) for name in (dtype, dense_dtype or dtype))
        names = Names(checkpoint, config)
        specs = layout(config)
        tensors = [names.tensor(spec, ffn, dense) for spec in specs]
        names.refuse_strangers()
        first = next(i for i, spec in enumerate(specs) if spec.role in (EMBEDDING, FFN))
        texts = {TOKENIZER: _tokenizer(checkpoint, note), TEMPLATE: checkpoint.chat_template()}
        for name, text in texts.items():
            if text is not None:
                tensors.insert(first, byte_tensor(name, text.encode("utf-8")))
        hf_config = dict(checkpoint.config)
        generation = checkpoint.generation_config()
        if "eos_token_id" in generation:
            hf_config["eos_token_id"] = generation["eos_token_id"]
        if named := checkpoint.special_tokens():
            hf_config["special_tokens_map"] = named
        total = sum(tensor.nbytes for tensor in tensors)
        order = None
        if low_disk:
            tensors, order = _shard_by_shard(tensors, names.sources, checkpoint)
        return write_bundle(
            destination,
            tensors,
            hf_config,
            source={"checkpoint": Path(source).name or Path(source).resolve().name},
            progress=(lambda nbytes: progress(nbytes, total)) if progress else lambda nbytes: None,
            order=order,
        )


def _tokenizer(checkpoint, note):
    """The text of its tokenizer.json, or None. A GGUF file is of use without."""
    try:
        return checkpoint.tokenizer_json()
    except FormatError as error:
        if not isinstance(checkpoint, GgufCheckpoint):
            raise
        note(f"{error}; converted without its tokenizer, for token ids (--tokens) only")
        return None


@contextmanager
def _opened(source, activation, low_disk, destination):
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


def _shard_by_shard(tensors, sources, checkpoint):
    """(tensors, the order to make them in) so that one shard is read after the other.

    sources  {tensor: names of those in the checkpoint that it is made of}
    Making the last tensor that needs a shard drops it.
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

    def dropping(tensor):
        done = [checkpoint.shards[i] for i, name in last_user.items() if name == tensor.name]

        def chunks():
            yield from tensor.chunks()
            for shard in done:
                shard.drop()

        return replace(tensor, chunks=chunks)

    return [dropping(tensor) for tensor in tensors], order


def open_checkpoint(source, activation=None):
    """The Checkpoint or GgufCheckpoint at ``source``."""
    if is_gguf(source):
        return GgufCheckpoint(source, activation)
    if activation is not None:
        raise UserError(f"{source}: its config says the activation; only GGUF files do not")
    return Checkpoint(fetch(source) if names_a_repository(source) else source)
