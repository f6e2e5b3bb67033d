"""Which of a checkpoint's tensors make each tensor of a bundle, by its architecture's names."""

import itertools
import re

import numpy as np

from ..bundle.layout import FFN, format_of
from ..bundle.writer import encoded, new_tensor
from ..errors import FormatError
from .checkpoint import COLUMN_CHUNK

CHUNK_VALUES = 4 << 20  # float32 values held at a time
HEADS = ("lm_head.weight", "lm_head.bias")
# Buffers that older checkpoints store beside weights: rotary frequencies and tables, masks.
BUFFERS = (
    "rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", ".masked_bias",
)  # fmt: skip


class Names:
    """Finds a checkpoint's tensors by the architecture's name map, and checks their shapes."""

    def __init__(self, checkpoint, config):
        self.checkpoint, self.config = checkpoint, config
        self.naming = naming = checkpoint.naming
        self.ffn, self.packed = naming.FFN, getattr(naming, "ROWS", {})
        fused = getattr(naming, "FUSED_FFN", None)
        if fused and any(name in checkpoint.shapes for name in alternatives(fused["down"], 0)):
            self.ffn, self.packed = fused, {**self.packed, **naming.FUSED_ROWS}
        self.names = {
            **naming.NAMES,
            **{f"layers.{{}}.ffn.{part}": name for part, name in self.ffn.items()},
        }
        self.heights = {}  # {packed tensor: its rows}
        for template, name in self.names.items():
            if rows := self.packed.get(_part(template)):
                height = int(rows(config).max()) + 1
                self.heights[name] = max(height, self.heights.get(name, 0))
        self.less_one = getattr(naming, "NORM_LESS_ONE", False)
        self.sources = {}  # {our tensor: names of those in the checkpoint that it is made of}

    def find(self, template, layer, shape, expert=None):
        """The checkpoint's name of a tensor, and which rows of it ours is (None: all).

        Where all of a layer's experts lie in one tensor, the rows are those of each.
        """
        named = self.names.get(template, template)
        names = alternatives(named, layer, expert, bare=template not in HEADS)
        name = next((n for n in names if n in self.checkpoint.shapes), None)
        if name is None:
            raise FormatError(f"{self.checkpoint.directory}: tensor {names[0]} is missing")
        rows = self.packed.get(_part(template))
        rows = None if rows is None else rows(self.config)
        expected = shape if rows is None else (self.heights[named], *shape[1:])
        if expert is not None and "{expert}" not in named:
            expected = expected[::-1] if self.turned(name) else expected
            expected = (self.config.experts, *expected)
        if self.checkpoint.shapes[name] != expected or (rows is not None and len(rows) != shape[0]):
            raise FormatError(
                f"{self.checkpoint.directory}: tensor {name} has the shape "
                f"{self.checkpoint.shapes[name]}, the config says {expected}"
            )
        return name, rows

    def turned(self, name):
        """Whether the experts' matrices lie in the checkpoint with rows and columns exchanged."""
        turned = getattr(self.naming, "EXPERTS_TURNED", False)
        return turned and not name.endswith(("_mxfp4", "_bias"))

    def tensor(self, spec, ffn, dense):
        """The NewTensor for a TensorSpec; the number formats are None to keep the checkpoint's."""
        layer, template = None, spec.name
        if match := re.match(r"layers\.(\d+)\.", spec.name):
            layer = match[1]
            template = spec.name.replace(match[0], "layers.{}.", 1)
        if spec.role == FFN:
            return self.bundle_tensor(spec, layer, ffn)
        if self.config.experts and ".ffn." in template and template.endswith("_bias"):
            return self.expert_biases(spec, template, layer)
        name, rows = self.find(template, layer, spec.shape)
        self.sources[spec.name] = [name]
        if dense is None and not spec.exact:
            dense = self.checkpoint.format_of(name)
        format = format_of(spec, ffn, dense)
        add = 1.0 if self.less_one and template.endswith("norm.weight") else 0.0
        return new_tensor(spec.name, format, spec.shape, lambda: self.rows(name, rows, format, add))

    def expert_biases(self, spec, template, layer):
        """The NewTensor of a bias of all of a layer's experts, one after the other."""
        size = spec.shape[0] // self.config.experts
        name, rows = self.find(template, layer, (size,), expert=0)
        self.sources[spec.name] = [name]
        rows = np.arange(size) if rows is None else rows
        return new_tensor(
            spec.name, format_of(spec, None, None), spec.shape,
            lambda: [self.checkpoint.read_rows(name)[:, rows].reshape(-1)],
        )  # fmt: skip

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

    def bundle_tensor(self, spec, layer, format):
        """The NewTensor of a layer's bundles, expert after expert."""
        config, experts = self.config, range(self.config.experts) if self.config.experts else [None]
        neurons, width = config.d_ffn // len(experts), spec.shape[1] // config.parts
        shapes = {part: (neurons, width) for part in ("gate", "up", "down_t")}
        shapes["down"] = (width, neurons)
        found = [
            {
                part: self.find(f"layers.{{}}.ffn.{part}", layer, shapes[part], expert)
                for part in self.ffn
            }
            for expert in experts
        ]
        self.sources[spec.name] = [name for parts in found for name, _ in parts.values()]
        format = format or self.checkpoint.format_of(found[0]["up"][0])

        def chunks():
            for number, parts in enumerate(found):
                yield from self.bundles(parts, number, neurons, format)

        return new_tensor(spec.name, format, spec.shape, chunks)

    def bundles(self, parts, expert, neurons, format):
        """Rows [gate_i | up_i | down_i]: rows of gate and up, column i of the down projection, or
        row i where the checkpoint has it transposed ("down_t")."""
        columns = self.columns(parts["down"][0], expert) if "down" in parts else None
        whole = {n: self.matrix(n, expert) for n, _ in parts.values() if self.turned(n)}
        for start in range(0, neurons, COLUMN_CHUNK):
            stop, bundle = min(start + COLUMN_CHUNK, neurons), []
            for name, rows in (parts[p] for p in ("gate", "up", "down_t") if p in parts):
                ids = np.arange(start, stop) if rows is None else rows[start:stop]
                if name in whole:
                    bundle.append(np.ascontiguousarray(whole[name][ids]))
                else:
                    bundle.append(self.rows_of_expert(name, expert, ids, format))
            bundle += [next(columns)] if columns else []
            yield np.concatenate([encoded(p, format) for p in bundle], axis=1)

    def rows_of_expert(self, name, expert, ids, format):
        """Rows ``ids``, ascending, of a matrix, or of one of those that lie in one tensor."""
        shape, first = self.checkpoint.shapes[name], int(ids[0])
        base = first + (expert * shape[1] if len(shape) == 3 else 0)
        values = self.read(name, format, base, base + int(ids[-1]) + 1 - first)
        return values if len(values) == len(ids) else values[ids - first]

    def columns(self, name, expert):
        """Yield a down projection transposed, in pieces (<= COLUMN_CHUNK, width) float32."""
        shape = self.checkpoint.shapes[name]
        if len(shape) == 2:
            yield from self.checkpoint.read_columns(name)
            return
        matrix = self.matrix(name, expert)
        for start in range(0, matrix.shape[1], COLUMN_CHUNK):
            yield np.ascontiguousarray(matrix[:, start : start + COLUMN_CHUNK].T)

    def matrix(self, name, expert):
        """One expert's, of a tensor that holds all of a layer's; float32."""
        rows = self.checkpoint.shapes[name][1]
        matrix = self.checkpoint.read_rows(name, expert * rows, (expert + 1) * rows)
        return matrix.T if self.turned(name) else matrix

    def refuse_strangers(self):
        """Raise FormatError where the checkpoint holds what the architecture has no use for."""
        strangers = self.checkpoint.shapes.keys() - set(itertools.chain(*self.sources.values()))
        strangers = {name for name in strangers if not name.endswith(BUFFERS)}
        if self.config.tied and HEADS[0] in strangers:
            self.refuse_another_head(HEADS[0], *self.sources["embed_tokens.weight"])
            strangers.discard(HEADS[0])
        if strangers:
            some = ", ".join(sorted(strangers)[:3])
            raise FormatError(
                f"{self.checkpoint.directory}: {len(strangers)} tensors that "
                f"{self.checkpoint.config['model_type']} does not have: {some}"
            )

    def refuse_another_head(self, head, embeddings):
        """Raise FormatError where a tied output head stands in the checkpoint, and is no copy."""
        shapes, read = self.checkpoint.shapes, self.checkpoint.read_rows
        same = shapes[head] == shapes[embeddings]
        step = max(1, CHUNK_VALUES // int(np.prod(shapes[embeddings][1:])))
        for start in range(0, shapes[embeddings][0], step):
            part = (start, min(start + step, shapes[embeddings][0]))
            same = same and np.array_equal(read(head, *part), read(embeddings, *part))
        if not same:
            raise FormatError(
                f"{self.checkpoint.directory}: tensor {head} differs from {embeddings}, to which "
                'config.json ties it; "tie_word_embeddings": false there uses it'
            )


def alternatives(named, layer, expert=None, bare=True):
    """The names that a tensor may have in a checkpoint; ``named`` has those of the whole model.

    bare  a checkpoint of the bare model, without its head, lacks the first part of the names
    """
    names = named.format(layer, layer, expert=expert).split("|")
    return names + [name.partition(".")[2] for name in names if bare]


def _part(template):
    """The key in ROWS: q_proj of layers.{}.q_proj.bias, gate of layers.{}.ffn.gate."""
    pieces = template.split(".")
    return pieces[-1] if "ffn" in pieces else ".".join(pieces[2:-1])


def _runs(rows):
    """Yield (start, stop) of the runs of neighbours among row ids."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for part in np.split(rows, breaks):
        yield int(part[0]), int(part[-1]) + 1
