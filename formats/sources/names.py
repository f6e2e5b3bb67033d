"""Which of a checkpoint's tensors make each tensor of a bundle, by its architecture's names."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..arrays import AnyArray, Float32Array, UInt8Array
from ..bundle.in_place import Run
from ..bundle.layout import bundled, format_of
from ..bundle.writer import NewTensor, encoded, new_tensor
from ..config import MOST_LAYERS, ModelConfig
from ..errors import FormatError
from ..number_formats import Matrices, NumberFormat
from ..numbers import is_whole
from ..tensors import FFN, TensorSpec
from .checkpoint import Checkpoint
from .gguf_checkpoint import GgufCheckpoint
from .shards import COLUMN_CHUNK

CHUNK_VALUES = 4 << 20  # float32 values held at a time
HEADS = ("lm_head.weight", "lm_head.bias")
WORTH_LEAVING = 64 << 10  # bytes of a matrix; smaller ones cost more to read where they lie
# Buffers that older checkpoints store beside weights: rotary frequencies and tables, and masks.
BUFFERS = (
    "rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", ".masked_bias",
    ".attention.bias", ".attn.bias", "embeddings.position_ids", "embeddings.token_type_ids",
)  # fmt: skip


class Found(NamedTuple):
    """A tensor of a checkpoint, and those of its rows that are meant; None: all of them."""

    name: str
    rows: AnyArray | None


class Names:
    """Finds a checkpoint's tensors by the architecture's name map, and checks their shapes."""

    def __init__(self, checkpoint: Checkpoint | GgufCheckpoint, config: ModelConfig) -> None:
        self.checkpoint, self.config = checkpoint, config
        naming: Any = checkpoint.naming  # an architecture's module, whose names are partly optional
        self.naming = naming
        # What a layer's experts are found by, and, of a mixture, its layers without experts.
        self.experts, self.packed = naming.FFN, getattr(naming, "ROWS", {})
        self.dense, self.packed_dense = getattr(naming, "DENSE_FFN", naming.FFN), self.packed
        fused = getattr(naming, "FUSED_FFN", None)
        if fused and self._has_any(fused["down"]):
            self.experts, self.packed = fused, {**self.packed, **naming.FUSED_ROWS}
        self.less_one = getattr(naming, "NORM_LESS_ONE", False)
        self.sources: dict[str, list[str]] = {}  # {our tensor: the checkpoint's that it is made of}
        self.left_out = self._further_layers()  # tensors that are no part of the model proper

    def keep_matrices(self) -> None:
        """From now on units that are always used whole keep their matrices as the checkpoint has
        them, where these are in blocks: of ``config`` these layers have ``matrices``."""
        self.config = self.config.with_matrices(
            [i for i in range(len(self.config.layers)) if self._in_blocks(i)]
        )

    def _in_blocks(self, layer: int) -> bool:
        """Whether a layer's units are used whole, and have blocks along their matrices' rows."""
        ffn, names = self.config.layers[layer].ffn, self.ffn(layer)
        if not ffn.neurons:
            return False
        single = ffn.sparse and not ffn.router  # neurons, which are read one by one
        if not isinstance(self.checkpoint, GgufCheckpoint) or single:
            return False
        if not ffn.matrix_shapes().keys() <= names.keys():  # or a down projection that is turned
            return False
        return any(
            self.checkpoint.format_of(name).block > 1
            for part in names.values()
            for name in alternatives(part, self.number("layers.{}.ffn.", layer), 0)
            if name in self.checkpoint.shapes
        )

    def _has_any(self, named: str) -> bool:
        """Whether the checkpoint holds a tensor of this name in any layer."""
        layers = {self.number("layers.{}.ffn", i) for i in range(self.config.num_hidden_layers)}
        return any(n in self.checkpoint.shapes for i in layers for n in alternatives(named, i))

    def number(self, template: str, layer: int) -> int:
        """The number that the checkpoint has for the layer of one of our tensors."""
        return number_there(self.naming, self.config, template, layer)

    def ffn(self, layer: int) -> dict[str, str]:
        """{"gate", "up", "down": the checkpoint's tensor} of a layer's FFN or of its experts."""
        return self.experts if self.config.layers[layer].ffn.router else self.dense

    def packed_rows(self, template: str, layer: int | None) -> AnyArray | None:
        """Which rows of a packed tensor are ours; None: it is not packed."""
        if layer is None:
            return None
        described = self.config.layers[layer]
        rows = (self.packed if described.ffn.router else self.packed_dense).get(part_of(template))
        return None if rows is None else rows(described)

    def height(self, named: str, layer: int) -> int:
        """The rows of the packed tensor of this name."""
        parts = {f"layers.{{}}.ffn.{part}": name for part, name in self.ffn(layer).items()}
        of_all = [
            rows
            for template, name in {**self.naming.NAMES, **parts}.items()
            if name == named
            and (rows := self.packed_rows(template, layer)) is not None
            and len(rows)
        ]
        return max(int(rows.max()) for rows in of_all) + 1

    def find(
        self, template: str, layer: int | None, shape: tuple[int, ...], expert: int | None = None
    ) -> Found:
        """The checkpoint's tensor that holds one of ours. Raises FormatError.

        template  our tensor's name with {} for the layer
        shape     our tensor's
        Where one tensor holds all of a layer's experts, ``Found.rows`` counts within each expert.
        """
        named = self.naming.NAMES.get(template, template)
        if layer is not None and template.startswith("layers.{}.ffn."):
            named = self.ffn(layer).get(part_of(template), named)
        number = None if layer is None else self.number(template, layer)
        names = alternatives(named, number, expert, bare=template not in HEADS)
        if template == "embed_tokens.weight" and self.config.tied:
            names += self.naming.NAMES.get(HEADS[0], HEADS[0]).split("|")
        name = next((n for n in names if n in self.checkpoint.shapes), None)
        if name is None:
            raise FormatError(f"{self.checkpoint.directory}: tensor {names[0]} is missing")
        if count := self.turned_heads(template, layer):
            shape = (count * shape[1], shape[0] // count)
        expected, rows = shape, self.packed_rows(template, layer)
        if template in getattr(self.naming, "STACKED", ()) and layer is not None:
            expected = (shape[0] * len(self.config.layers), *shape[1:])
            rows = layer * shape[0] + np.arange(shape[0])
        elif rows is not None and layer is not None:
            expected = (self.height(named, layer), *shape[1:])
        elif (number := getattr(self.naming, "NUMBERED", {}).get(template)) is not None:
            expected = (shape[0] * (self.config.hidden_states - 1), *shape[1:])
            rows = number * shape[0] + np.arange(shape[0])
        if len(shape) == 2 and self.turned(template, name):
            expected = expected[::-1]
        if expert is not None and layer is not None and "{expert}" not in named:
            expected = (self.config.layers[layer].ffn.experts, *expected)
        if template in getattr(self.naming, "ONE_ROW", ()):
            expected = (1, *expected)
        if template in getattr(self.naming, "CONVOLUTIONS", ()):
            expected = (expected[0], 1, *expected[1:])
        if self.checkpoint.shapes[name] != expected or (rows is not None and len(rows) != shape[0]):
            raise FormatError(
                f"{self.checkpoint.directory}: tensor {name} has the shape "
                f"{self.checkpoint.shapes[name]}, the config says {expected}"
            )
        return Found(name, rows)

    def turned(self, template: str, name: str) -> bool:
        """Whether a matrix of ours lies in the checkpoint, as ``name``, with rows and columns
        exchanged."""
        part = part_of(template)
        if part in getattr(self.naming, "TURNED_BY_SHAPE", ()):
            side = -2 if part == "down" else -1  # that of the hidden size, where it is not turned
            return self.checkpoint.shapes[name][side] != self.config.hidden_size
        return part in getattr(self.naming, "TURNED", ()) and not name.endswith("_mxfp4")

    def turned_heads(self, template: str, layer: int | None) -> int:
        """How many matrices lie below each other in one of ours, of which each has rows and columns
        exchanged in the checkpoint; 0: none has."""
        heads = getattr(self.naming, "TURNED_HEADS", {}).get(part_of(template))
        return 0 if heads is None or layer is None else heads(self.config.layers[layer])

    def tensor(
        self, spec: TensorSpec, ffn: NumberFormat | None, dense: NumberFormat | None
    ) -> NewTensor:
        """The NewTensor for a TensorSpec.

        ffn, dense  number formats of FFN weights, and of others; None: the checkpoint's own choice
        """
        template, layer = spec.name, spec.layer
        if layer is not None:
            template = template.replace(f"layers.{layer}.", "layers.{}.", 1)
            of_experts = self.config.layers[layer].ffn.router is not None
            if spec.role == FFN:
                return self.bundle_tensor(spec, layer, ffn)
            if of_experts and ".ffn." in template and template.endswith("_bias"):
                return self.expert_biases(spec, template, layer)
        name, rows = self.find(template, layer, spec.shape)
        self.sources[spec.name] = [name]
        heads = self.turned_heads(template, layer)
        if dense is None and not spec.exact:
            dense = self.checkpoint.format_of(name)
            if heads and dense.block > 1:
                dense = None  # 16 bits, because blocks along the other side would be rounded anew
        format = format_of(spec, dense=dense) if dense else format_of(spec)
        if heads:
            return new_tensor(
                spec.name, format, spec.shape, lambda: self.rows_of_heads(name, rows, heads)
            )
        if len(spec.shape) == 2 and self.turned(template, name):
            return new_tensor(spec.name, format, spec.shape, lambda: self.turned_rows(name, rows))
        if function := getattr(self.naming, "VALUES", {}).get(template):
            return new_tensor(
                spec.name, format, spec.shape, lambda: [function(self.checkpoint.read_rows(name))]
            )
        add = 1.0 if self.less_one and template.endswith("norm.weight") else 0.0
        tensor = new_tensor(
            spec.name, format, spec.shape, lambda: self.rows(name, rows, format, add)
        )
        run = None
        if len(spec.shape) == 2 and not add and tensor.nbytes >= WORTH_LEAVING:
            run = self.run(name, rows, spec.shape[0], format)
        return tensor if run is None else replace(tensor, lies=(Run(run.address, tensor.nbytes),))

    def run(self, name: str, rows: AnyArray | None, count: int, format: NumberFormat) -> Run | None:
        """Where the checkpoint has ``count`` rows of a tensor, those numbered ``rows``, as they are
        to be in ``format``; None where they do not follow each other, or are not so there."""
        first = 0 if rows is None else int(rows[0])
        if not isinstance(self.checkpoint, GgufCheckpoint):
            return None
        if rows is not None and not np.array_equal(rows, first + np.arange(count)):
            return None
        return self.checkpoint.run_of(name, format, first, count)

    def expert_biases(self, spec: TensorSpec, template: str, layer: int) -> NewTensor:
        """The NewTensor of a bias of all of a layer's experts, one after the other."""
        size = spec.shape[0] // self.config.layers[layer].ffn.experts
        name, rows = self.find(template, layer, (size,), expert=0)
        self.sources[spec.name] = [name]
        columns = np.arange(size) if rows is None else rows
        return new_tensor(
            spec.name, format_of(spec), spec.shape,
            lambda: [self.checkpoint.read_rows(name)[:, columns].reshape(-1)],
        )  # fmt: skip

    def rows(
        self, name: str, rows: AnyArray | None, format: NumberFormat, add: float
    ) -> Iterator[Float32Array | UInt8Array]:
        """Yield the rows numbered ``rows`` (None: all) of a tensor, with ``add`` added to them.

        They are float32, or bytes where the checkpoint holds them in this NumberFormat already.
        """
        shape = self.checkpoint.shapes[name]
        rows = np.arange(shape[0]) if rows is None else rows
        step = max(1, CHUNK_VALUES // int(np.prod(shape[1:])))
        for first in range(0, len(rows), step):
            runs = [
                self.read(name, format, start, stop) for start, stop in _runs(rows[first:][:step])
            ]
            values: AnyArray = runs[0] if len(runs) == 1 else np.concatenate(runs)
            yield values + np.float32(add) if add else values

    def turned_rows(self, name: str, rows: AnyArray | None) -> Iterator[Float32Array]:
        """Yield the rows numbered ``rows``, ascending (None: all), of a matrix whose rows and
        columns are exchanged in the checkpoint, float32."""
        first = 0
        for piece in self.checkpoint.read_columns(name):
            ids = np.arange(len(piece)) if rows is None else rows - first
            here = ids[(ids >= 0) & (ids < len(piece))]
            if len(here):
                yield np.ascontiguousarray(piece[here])
            first += len(piece)

    def rows_of_heads(self, name: str, rows: AnyArray | None, heads: int) -> Iterator[Float32Array]:
        """Yield the rows numbered ``rows`` (None: all) of a matrix in which rows and columns of
        each head's part are exchanged, float32."""
        rows = np.arange(self.checkpoint.shapes[name][0]) if rows is None else rows
        for ids in rows.reshape(heads, -1):
            runs = [self.checkpoint.read_rows(name, *run) for run in _runs(ids)]
            yield np.ascontiguousarray(np.concatenate(runs).T)

    def read(
        self, name: str, format: NumberFormat, start: int, stop: int
    ) -> Float32Array | UInt8Array:
        """Rows ``start:stop`` as bytes where they are in ``format`` already, else as float32."""
        raw = self.checkpoint.raw_rows(name, format, start, stop)
        return self.checkpoint.read_rows(name, start, stop) if raw is None else raw

    def bundle_tensor(self, spec: TensorSpec, layer: int, format: NumberFormat | None) -> NewTensor:
        """The NewTensor of a layer's bundles, expert after expert."""
        ffn = self.config.layers[layer].ffn
        experts: list[int | None] = list(range(ffn.experts)) if ffn.router else [None]
        neurons, width = ffn.d_ffn, ffn.hidden_size
        shapes = {part: (neurons, width) for part in ("gate", "up", "down_t")}
        shapes["down"] = (width, neurons)
        found = [
            {
                part: self.find(f"layers.{{}}.ffn.{part}", layer, shapes[part], expert)
                for part in self.ffn(layer)
            }
            for expert in experts
        ]
        self.sources[spec.name] = [name for parts in found for name, _ in parts.values()]
        if ffn.matrices:
            formats = [
                format or self.checkpoint.format_of(found[0][part].name)
                for part in ffn.matrix_shapes()
            ]
            whole = Matrices(ffn.matrix_shapes(), formats)
            tensor = new_tensor(spec.name, whole, spec.shape, lambda: self.matrices(found, whole))
            runs = [
                self.run(*found[0][part], described.rows, described.format)
                for part, described in whole.parts.items()
            ]
            together = all(len(self.checkpoint.shapes[f.name]) == 3 for f in found[0].values())
            lies = tuple(run for run in runs if run is not None)
            if len(lies) < len(runs) or (ffn.router and not together):
                return tensor
            return replace(tensor, lies=lies)
        chosen = format or self.checkpoint.format_of(found[0]["up"].name)

        def chunks() -> Iterator[UInt8Array]:
            for number, parts in enumerate(found):
                yield from self.bundles(parts, number, neurons, chosen)

        return new_tensor(spec.name, chosen, spec.shape, chunks)

    def bundles(
        self, parts: dict[str, Found], expert: int, neurons: int, format: NumberFormat
    ) -> Iterator[UInt8Array]:
        """Yield bundles [gate_i | up_i | down_i], (<= COLUMN_CHUNK, bytes).

        gate_i and up_i are rows, and down_i is a column, or the other way round where the
        checkpoint has the matrix turned; it may have a down projection transposed ("down_t").
        """
        across = {
            part: found
            for part, found in parts.items()
            if (part == "down") != self.turned(f"layers.{{}}.ffn.{part}", found.name)
        }
        # What is read whole: matrices across whose rows neurons lie, in a tensor of all experts.
        names = {name for name, _ in across.values() if len(self.checkpoint.shapes[name]) == 3}
        whole = {name: self.matrix(name, expert) for name in names}
        columns = {part: self.columns(found, whole) for part, found in across.items()}
        for start in range(0, neurons, COLUMN_CHUNK):
            stop = min(start + COLUMN_CHUNK, neurons)
            bundle: list[AnyArray] = []
            for part in (p for p in ("gate", "up", "down", "down_t") if p in parts):
                if part in columns:
                    bundle.append(next(columns[part]))
                    continue
                name, rows = parts[part]
                ids = np.arange(start, stop) if rows is None else rows[start:stop]
                bundle.append(self.rows_of_expert(name, expert, ids, format))
            yield bundled([encoded(p, format) for p in bundle])

    def matrices(
        self, found: list[dict[str, Found]], whole: Matrices
    ) -> Iterator[Float32Array | UInt8Array]:
        """Yield the bytes of each unit's matrices, and of what fills its last page."""
        used = sum(part.nbytes for part in whole.parts.values())
        for number, parts in enumerate(found):
            for part, described in whole.parts.items():
                name, rows = parts[part]
                step = max(1, CHUNK_VALUES // described.columns)
                for start in range(0, described.rows, step):
                    stop = min(start + step, described.rows)
                    ids = np.arange(start, stop) if rows is None else rows[start:stop]
                    values = self.rows_of_expert(name, number, ids, described.format)
                    yield encoded(values, described.format)
            if used < whole.block_bytes:
                yield np.zeros((1, whole.block_bytes - used), dtype=np.uint8)

    def rows_of_expert(
        self, name: str, expert: int, ids: AnyArray, format: NumberFormat
    ) -> Float32Array | UInt8Array:
        """Rows ``ids``, ascending, of a matrix, or of an expert's matrix within one tensor."""
        shape, first = self.checkpoint.shapes[name], int(ids[0])
        base = first + (expert * shape[1] if len(shape) == 3 else 0)
        values = self.read(name, format, base, base + int(ids[-1]) + 1 - first)
        return values if len(values) == len(ids) else values[ids - first]

    def columns(self, found: Found, whole: dict[str, Float32Array]) -> Iterator[Float32Array]:
        """Yield the columns of a matrix that are meant, in pieces (<= COLUMN_CHUNK, height)
        float32; whole: {name: matrix} of those read already."""
        name, ids = found
        if name not in whole:
            yield from self.checkpoint.read_columns(name)
            return
        ids = np.arange(whole[name].shape[1]) if ids is None else ids
        for start in range(0, len(ids), COLUMN_CHUNK):
            yield np.ascontiguousarray(whole[name][:, ids[start : start + COLUMN_CHUNK]].T)

    def matrix(self, name: str, expert: int) -> Float32Array:
        """One expert's matrix, of a tensor that holds those of all of a layer's experts."""
        rows = self.checkpoint.shapes[name][1]
        return self.checkpoint.read_rows(name, expert * rows, (expert + 1) * rows)

    def _further_layers(self) -> set[str]:
        """The tensors of layers that follow the last, such as those that predict a second token."""
        field, first = getattr(self.naming, "FURTHER_LAYERS", None), len(self.config.layers)
        count = self.checkpoint.config.get(field) if field else 0
        further = range(first, first + count) if is_whole(count, 1, MOST_LAYERS) else ()
        prefixes = tuple(f"model.layers.{layer}." for layer in further)
        prefixes += getattr(self.naming, "FURTHER_NAMES", ())
        return {name for name in self.checkpoint.shapes if name.startswith(prefixes)}

    def refuse_strangers(self) -> None:
        """Raise FormatError where the checkpoint holds tensors that the architecture lacks."""
        strangers = self.checkpoint.shapes.keys() - set(itertools.chain(*self.sources.values()))
        strangers = {name for name in strangers if not name.endswith(BUFFERS)} - self.left_out
        strangers -= set(getattr(self.naming, "UNUSED", ()))
        strangers -= self._borrowed()
        strangers -= self._copies_of_heads(strangers)
        if strangers:
            some = ", ".join(sorted(strangers)[:3])
            raise FormatError(
                f"{self.checkpoint.directory}: {len(strangers)} tensors that "
                f"{self.checkpoint.config['model_type']} does not have: {some}"
            )

    def _borrowed(self) -> set[str]:
        """The tensors of layers that have no use for them, as they read another layer's memory."""
        layers = enumerate(self.config.layers)
        borrowers = [number for number, layer in layers if layer.mixer.memory_of is not None]
        names = getattr(self.naming, "BORROWED", ())
        return {n for layer in borrowers for name in names for n in alternatives(name, layer)}

    def _copies_of_heads(self, strangers: set[str]) -> set[str]:
        """Those of the strangers that are the output head or its biases once more. Raises
        FormatError where they are tied, and differ."""
        found = set()
        for template in HEADS:
            tied = self.config.tied and template == HEADS[0]
            held = self.sources.get("embed_tokens.weight" if tied else template, [])
            names = self.naming.NAMES.get(template, template).split("|")
            for copy in strangers.intersection(names) if held else ():
                if self.config.tied:
                    self.refuse_another_head(copy, *held)
                found.add(copy)
        return found

    def refuse_another_head(self, head: str, embeddings: str) -> None:
        """Raise FormatError where a tied output head, or a copy of its biases, is not the same."""
        shapes, read = self.checkpoint.shapes, self.checkpoint.read_rows
        same = shapes[head] == shapes[embeddings]
        step = max(1, CHUNK_VALUES // int(np.prod(shapes[embeddings][1:])))
        for start in range(0, shapes[embeddings][0], step):
            part = (start, min(start + step, shapes[embeddings][0]))
            same = same and np.array_equal(read(head, *part), read(embeddings, *part))
        if not same:
            hint = '; "tie_word_embeddings": false there uses it' if head.endswith("weight") else ""
            raise FormatError(
                f"{self.checkpoint.directory}: tensor {head} differs from {embeddings}, to which "
                f"config.json ties it{hint}"
            )


def alternatives(
    named: str, layer: int | None, expert: int | None = None, bare: bool = True
) -> list[str]:
    """The names that a tensor may have in a checkpoint.

    named  those in a checkpoint of the whole model, separated by "|"; {} is the layer
    bare   add those in a checkpoint of the model without its head, which lack the first part
    """
    names = named.format(layer, layer, expert=expert).split("|")
    return names + [name.partition(".")[2] for name in names if bare]


def number_there(naming: Any, config: ModelConfig, template: str, layer: int) -> int:
    """The number that a checkpoint has for the layer of our tensor ``template``: ours, or where
    blocks are numbered that of the mixer, or of the FFN behind it."""
    if not getattr(naming, "BLOCKS", False):
        return layer
    before = sum(2 if other.ffn.neurons else 1 for other in config.layers[:layer])
    of_ffn = template.split(".")[2] in ("ffn_norm", "ffn", "router", "shared")
    return before + of_ffn


def part_of(template: str) -> str:
    """The key in ROWS: "q_proj" for layers.{}.q_proj.bias, "gate" for layers.{}.ffn.gate."""
    pieces = template.split(".")
    return pieces[-1] if "ffn" in pieces else ".".join(pieces[2:-1])


def _runs(rows: AnyArray) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each run of consecutive row ids."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for part in np.split(rows, breaks):
        yield int(part[0]), int(part[-1]) + 1
