"""From a Hugging Face checkpoint to a flat bundle, a piece at a time."""

import re
from pathlib import Path

import numpy as np

from .architectures import architecture
from .checkpoint import COLUMN_CHUNK, Checkpoint, tokenizer_json
from .errors import FormatError
from .layout import EMBEDDING, FFN, TOKENIZER, format_of, layout
from .number_formats import number_format
from .writing import byte_tensor, new_tensor, write_bundle

CHUNK_VALUES = 4 << 20  # float32 values held at a time
HEADS = ("lm_head.weight", "lm_head.bias")


def convert(source, destination, dtype="f16", progress=None, dense_dtype=None):
    """Convert the checkpoint in directory ``source`` to the bundle ``destination``.

    dtype        number format of the weights; norms and biases are always f32
    progress     called as progress(bytes_written, bytes_in_all)
    dense_dtype  number format of what is not FFN, where it is to be another

    Returns the size in bytes. Memory: the largest FFN matrix in the checkpoint's own format, and
    some tens of MB. Raises FormatError where the checkpoint is not sound or not supported.
    """
    ffn, dense = number_format(dtype), number_format(dense_dtype or dtype)
    with Checkpoint(source) as checkpoint:
        try:
            module = architecture(checkpoint.config)
            config = module.model_config(checkpoint.config)
        except FormatError as error:
            raise FormatError(f"{Path(source) / 'config.json'}: {error}") from None
        names = _Names(checkpoint, module, config)
        specs = layout(config)
        tensors = [names.tensor(spec, format_of(spec, ffn, dense)) for spec in specs]
        names.refuse_strangers(config)
        tokenizer = tokenizer_json(source)
        if tokenizer is not None:
            first = next(i for i, spec in enumerate(specs) if spec.role in (EMBEDDING, FFN))
            tensors.insert(first, byte_tensor(TOKENIZER, tokenizer.encode("utf-8")))
        hf_config = dict(checkpoint.config)
        generation = checkpoint.generation_config()
        if "eos_token_id" in generation:
            hf_config["eos_token_id"] = generation["eos_token_id"]
        total = sum(tensor.nbytes for tensor in tensors)
        return write_bundle(
            destination,
            tensors,
            hf_config,
            source={"checkpoint": Path(source).resolve().name},
            progress=(lambda nbytes: progress(nbytes, total)) if progress else lambda nbytes: None,
        )


class _Names:
    """Finds a checkpoint's tensors by the architecture's name map, and checks their shapes."""

    def __init__(self, checkpoint, module, config):
        self.checkpoint, self.module, self.config = checkpoint, module, config
        self.names = {
            **module.NAMES,
            **{f"layers.{{}}.ffn.{part}": name for part, name in module.FFN.items()},
        }
        self.packed = getattr(module, "ROWS", {})  # which rows of a packed tensor ours is
        self.less_one = getattr(module, "NORM_LESS_ONE", False)
        self.used = set()

    def find(self, template, layer, shape):
        """The checkpoint's name of a tensor, and which rows of it ours is (None: all)."""
        names = self.names.get(template, template).format(layer, layer).split("|")
        # A checkpoint of the bare model, without its head, lacks the first part of the names.
        names += [name.partition(".")[2] for name in names if template not in HEADS]
        name = next((n for n in names if n in self.checkpoint.shapes), None)
        if name is None:
            raise FormatError(f"{self.checkpoint.directory}: tensor {names[0]} is missing")
        rows = self.packed.get(_part(template))
        rows = None if rows is None else rows(self.config)
        found = self.checkpoint.shapes[name]
        fits = found == shape
        if rows is not None:  # as long as the last row of any of the parts
            packed = max(int(r(self.config)[-1]) + 1 for p, r in self._beside(template))
            fits = found == (packed, *shape[1:]) and len(rows) == shape[0]
        if not fits:
            raise FormatError(
                f"{self.checkpoint.directory}: tensor {name} has the shape {found}, the config "
                f"says {shape if rows is None else (packed, *shape[1:])}"
            )
        self.used.add(name)
        return name, rows

    def _beside(self, template):
        """The parts that are packed into one tensor with this one."""
        ffn = _part(template) in ("gate", "up")
        return [(p, r) for p, r in self.packed.items() if (p in ("gate", "up")) == ffn]

    def tensor(self, spec, format):
        """The NewTensor for a TensorSpec."""
        layer, template = None, spec.name
        if match := re.match(r"layers\.(\d+)\.", spec.name):
            layer = match[1]
            template = spec.name.replace(match[0], "layers.{}.", 1)
        if spec.role == FFN:
            neurons, width = spec.shape[0], spec.shape[1] // self.config.parts
            shapes = {"gate": (neurons, width), "up": (neurons, width), "down": (width, neurons)}
            parts = {
                part: self.find(f"layers.{{}}.ffn.{part}", layer, shapes[part])
                for part in self.module.FFN
            }
            return new_tensor(spec.name, format, spec.shape, lambda: self.bundles(parts))
        name, rows = self.find(template, layer, spec.shape)
        add = 1.0 if self.less_one and template.endswith("norm.weight") else 0.0
        return new_tensor(spec.name, format, spec.shape, lambda: self.rows(name, rows, add))

    def rows(self, name, rows, add):
        shape = self.checkpoint.shapes[name]
        step = max(1, CHUNK_VALUES // int(np.prod(shape[1:])))
        for start, stop in _runs(rows, shape[0]):
            for first in range(start, stop, step):
                values = self.checkpoint.read_rows(name, first, min(first + step, stop))
                yield values + np.float32(add) if add else values

    def bundles(self, parts):
        """Rows [gate_i | up_i | down_i]: rows of gate and up, column i of the down projection."""
        start = 0
        for columns in self.checkpoint.read_columns(parts["down"][0]):
            above = []
            for part in ("gate", "up"):
                if part in parts:
                    name, rows = parts[part]
                    first = start + (0 if rows is None else int(rows[0]))  # packed ones lie apart
                    above.append(self.checkpoint.read_rows(name, first, first + len(columns)))
            yield np.concatenate([*above, columns], axis=1)
            start += COLUMN_CHUNK

    def refuse_strangers(self, config):
        """Raise FormatError where the checkpoint holds what the architecture has no use for."""
        strangers = self.checkpoint.shapes.keys() - self.used
        if config.tied:
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
    """ "layers.{}.q_proj.bias" -> "q_proj"; "layers.{}.ffn.gate" -> "gate"."""
    pieces = template.split(".")
    return pieces[-1] if "ffn" in pieces else pieces[-2]


def _runs(rows, all_rows):
    """Yield (start, stop) of the runs of neighbours among ascending row ids; None: all rows."""
    if rows is None:
        yield 0, all_rows
        return
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for part in np.split(rows, breaks):
        yield int(part[0]), int(part[-1]) + 1
