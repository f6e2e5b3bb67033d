"""From a Hugging Face checkpoint or a GGUF file to a flat bundle, a piece at a time."""

import itertools
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from .architectures import architecture
from .checkpoint import COLUMN_CHUNK, Checkpoint
from .errors import FormatError, UserError
from .gguf import is_gguf
from .gguf_checkpoint import GgufCheckpoint
from .hub import fetch, lean_checkpoint, names_a_repository
from .layout import EMBEDDING, FFN, TEMPLATE, TOKENIZER, format_of, layout
from .number_formats import number_format
from .writing import byte_tensor, encoded, new_tensor, write_bundle

CHUNK_VALUES = 4 << 20  # float32 values held at a time
HEADS = ("lm_head.weight", "lm_head.bias")


def convert(
    source, destination, dtype=None, progress=None, dense_dtype=None, activation=None,
    low_disk=False,
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

    Returns the size in bytes. Memory: the largest FFN matrix in the checkpoint's own format, and
    some tens of MB. Raises FormatError where the checkpoint is not sound or not supported.
    """
    with _opened(source, activation, low_disk, Path(destination)) as checkpoint:
        try:
            config = architecture(checkpoint.config).model_config(checkpoint.config)
        except FormatError as error:
            raise FormatError(f"{checkpoint.config_path}: {error}") from None
        if dtype is None and not isinstance(checkpoint, GgufCheckpoint):
            dtype = "f16"
        ffn, dense = (name and number_format(name) for name in (dtype, dense_dtype or dtype))
        names = _Names(checkpoint, config)
        specs = layout(config)
        tensors = [names.tensor(spec, ffn, dense) for spec in specs]
        names.refuse_strangers()
        first = next(i for i, spec in enumerate(specs) if spec.role in (EMBEDDING, FFN))
        texts = {TOKENIZER: checkpoint.tokenizer_json(), TEMPLATE: checkpoint.chat_template()}
        for name, text in texts.items():
            if text is not None:
                tensors.insert(first, byte_tensor(name, text.encode("utf-8")))
        hf_config = dict(checkpoint.config)
        generation = checkpoint.generation_config()
        if "eos_token_id" in generation:
            hf_config["eos_token_id"] = generation["eos_token_id"]
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


@contextmanager
def _opened(source, activation, low_disk, destination):
    if not low_disk:
        with open_checkpoint(source, activation) as checkpoint:
            yield checkpoint
        return
    if not names_a_repository(source) or activation is not None:
        raise UserError(f"{source}: --low-disk is for checkpoints on the Hub, given as org/name")
    if not destination.parent.is_dir():
        raise UserError(f"{destination}: its directory does not exist")
    with (
        TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as folder,
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
        tensor.name: {number[id(checkpoint.shard_of[n])] for n in sources.get(tensor.name, ())}
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


class _Names:
    """Finds a checkpoint's tensors by the architecture's name map, and checks their shapes."""

    def __init__(self, checkpoint, config):
        self.checkpoint, self.config = checkpoint, config
        self.naming = naming = checkpoint.naming
        self.names = {
            **naming.NAMES,
            **{f"layers.{{}}.ffn.{part}": name for part, name in naming.FFN.items()},
        }
        self.packed = getattr(naming, "ROWS", {})  # which rows of a packed tensor ours is
        self.heights = {}  # {packed tensor: its rows}
        for template, name in self.names.items():
            if rows := self.packed.get(_part(template)):
                height = int(rows(config).max()) + 1
                self.heights[name] = max(height, self.heights.get(name, 0))
        self.less_one = getattr(naming, "NORM_LESS_ONE", False)
        self.sources = {}  # {our tensor: names of those in the checkpoint that it is made of}

    def find(self, template, layer, shape):
        """The checkpoint's name of a tensor, and which rows of it ours is (None: all)."""
        named = self.names.get(template, template)
        names = named.format(layer, layer).split("|")
        # A checkpoint of the bare model, without its head, lacks the first part of the names.
        names += [name.partition(".")[2] for name in names if template not in HEADS]
        name = next((n for n in names if n in self.checkpoint.shapes), None)
        if name is None:
            raise FormatError(f"{self.checkpoint.directory}: tensor {names[0]} is missing")
        rows = self.packed.get(_part(template))
        rows = None if rows is None else rows(self.config)
        expected = shape if rows is None else (self.heights[named], *shape[1:])
        if self.checkpoint.shapes[name] != expected or (rows is not None and len(rows) != shape[0]):
            raise FormatError(
                f"{self.checkpoint.directory}: tensor {name} has the shape "
                f"{self.checkpoint.shapes[name]}, the config says {expected}"
            )
        return name, rows

    def tensor(self, spec, ffn, dense):
        """The NewTensor for a TensorSpec; the number formats are None to keep the checkpoint's."""
        layer, template = None, spec.name
        if match := re.match(r"layers\.(\d+)\.", spec.name):
            layer = match[1]
            template = spec.name.replace(match[0], "layers.{}.", 1)
        if spec.role == FFN:
            neurons, width = spec.shape[0], spec.shape[1] // self.config.parts
            shapes = {part: (neurons, width) for part in ("gate", "up", "down_t")}
            shapes["down"] = (width, neurons)
            parts = {
                part: self.find(f"layers.{{}}.ffn.{part}", layer, shapes[part])
                for part in self.naming.FFN
            }
            self.sources[spec.name] = [name for name, _ in parts.values()]
            format = ffn or self.checkpoint.format_of(parts["up"][0])
            return new_tensor(spec.name, format, spec.shape, lambda: self.bundles(parts, format))
        name, rows = self.find(template, layer, spec.shape)
        self.sources[spec.name] = [name]
        if dense is None and not spec.exact:
            dense = self.checkpoint.format_of(name)
        format = format_of(spec, ffn, dense)
        add = 1.0 if self.less_one and template.endswith("norm.weight") else 0.0
        return new_tensor(spec.name, format, spec.shape, lambda: self.rows(name, rows, format, add))

    def rows(self, name, rows, format, add):
        """Yield a tensor's rows, or those numbered ``rows``: float32, or bytes of ``format``."""
        shape = self.checkpoint.shapes[name]
        rows = np.arange(shape[0]) if rows is None else rows
        step = max(1, CHUNK_VALUES // int(np.prod(shape[1:])))
        for first in range(0, len(rows), step):
            runs = [
                self.read(name, format, start, stop) for start, stop in _runs(rows[first:][:step])
            ]
            values = runs[0] if len(runs) == 1 else np.concatenate(runs)
            yield values + np.float32(add) if add else values

    def read(self, name, format, start, stop):
        """Rows ``start:stop`` as they are, where that is in ``format``, else as float32."""
        raw = self.checkpoint.raw_rows(name, format, start, stop)
        return self.checkpoint.read_rows(name, start, stop) if raw is None else raw

    def bundles(self, parts, format):
        """Rows [gate_i | up_i | down_i]: rows of gate and up, column i of the down projection, or
        row i where the checkpoint has it transposed ("down_t")."""
        columns = self.checkpoint.read_columns(parts["down"][0]) if "down" in parts else None
        for start in range(0, self.config.d_ffn, COLUMN_CHUNK):
            n, bundle = min(COLUMN_CHUNK, self.config.d_ffn - start), []
            for part in ("gate", "up", "down_t"):
                if part in parts:
                    name, rows = parts[part]
                    first = start + (0 if rows is None else int(rows[0]))  # packed ones lie apart
                    bundle.append(self.read(name, format, first, first + n))
            bundle += [next(columns)] if columns else []
            yield np.concatenate([encoded(p, format) for p in bundle], axis=1)

    def refuse_strangers(self):
        """Raise FormatError where the checkpoint holds what the architecture has no use for."""
        strangers = self.checkpoint.shapes.keys() - set(itertools.chain(*self.sources.values()))
        if self.config.tied:
            strangers -= {"lm_head.weight"}  # a copy of the embeddings
        # Some older checkpoints hold the frequencies of the rotary positions.
        strangers = {name for name in strangers if not name.endswith("rotary_emb.inv_freq")}
        if strangers:
            some = ", ".join(sorted(strangers)[:3])
            raise FormatError(
                f"{self.checkpoint.directory}: {len(strangers)} tensors that "
                f"{self.checkpoint.config['model_type']} does not have: {some}"
            )


def _part(template):
    """The key in ROWS: q_proj of layers.{}.q_proj.bias, gate of layers.{}.ffn.gate."""
    pieces = template.split(".")
    return pieces[-1] if "ffn" in pieces else pieces[-2]


def _runs(rows):
    """Yield (start, stop) of the runs of neighbours among row ids."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for part in np.split(rows, breaks):
        yield int(part[0]), int(part[-1]) + 1
