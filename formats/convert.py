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
        names = _Names(checkpoint, module)
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

    def __init__(self, checkpoint, module):
        self.checkpoint, self.module = checkpoint, module
        self.prefix = "model." if any(n.startswith("model.") for n in checkpoint.shapes) else ""
        self.used = set()

    def find(self, template, layer, shape):
        name = self.prefix + template.format(layer)
        if template == "lm_head.weight":
            name = template
        if name not in self.checkpoint.shapes:
            raise FormatError(f"{self.checkpoint.directory}: tensor {name} is missing")
        if self.checkpoint.shapes[name] != shape:
            raise FormatError(
                f"{self.checkpoint.directory}: tensor {name} has the shape "
                f"{self.checkpoint.shapes[name]}, the config says {shape}"
            )
        self.used.add(name)
        return name

    def tensor(self, spec, format):
        """The NewTensor for a TensorSpec."""
        layer, template = None, spec.name
        if match := re.match(r"layers\.(\d+)\.", spec.name):
            layer = match[1]
            template = spec.name.replace(match[0], "layers.{}.", 1)
        if spec.role == FFN:
            neurons, width = spec.shape[0], spec.shape[1] // 2
            up = self.find(self.module.UP, layer, (neurons, width))
            down = self.find(self.module.DOWN, layer, (width, neurons))
            return new_tensor(spec.name, format, spec.shape, lambda: self.bundles(up, down))
        name = self.find(self.module.NAMES.get(template, template), layer, spec.shape)
        return new_tensor(spec.name, format, spec.shape, lambda: self.rows(name))

    def rows(self, name):
        shape = self.checkpoint.shapes[name]
        step = max(1, CHUNK_VALUES // int(np.prod(shape[1:])))
        for start in range(0, shape[0], step):
            yield self.checkpoint.read_rows(name, start, start + step)

    def bundles(self, up, down):
        """Rows [up_i | down_i]: row i of the up and column i of the down projection."""
        start = 0
        for columns in self.checkpoint.read_columns(down):
            rows = self.checkpoint.read_rows(up, start, start + COLUMN_CHUNK)
            yield np.concatenate([rows, columns], axis=1)
            start += COLUMN_CHUNK

    def refuse_strangers(self, config):
        """Raise FormatError where the checkpoint holds what the architecture has no use for."""
        strangers = self.checkpoint.shapes.keys() - self.used
        if config.tied:
            strangers -= {"lm_head.weight"}  # a copy of the embeddings
        if strangers:
            some = ", ".join(sorted(strangers)[:3])
            raise FormatError(
                f"{self.checkpoint.directory}: {len(strangers)} tensors that "
                f"{self.module.MODEL_TYPE} does not have: {some}"
            )
