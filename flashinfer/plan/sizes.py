"""What the parts of a model take in DRAM, before a budget is divided among them."""

import math
from collections.abc import Collection, Sequence

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.formats.layers.mixer import MixerConfig
from flashinfer.formats.number_formats import Matrices
from flashinfer.formats.tensors import (
    ATTENTION,
    EMBEDDING,
    FFN,
    PREDICTOR,
    ROLES,
    SMALL,
    TensorSpec,
)
from flashinfer.paper import neurons
from flashinfer.paper.neuron_cache import BOOKKEEPING
from flashinfer.paper.rounded_down import room_bytes
from flashinfer.paper.unit_store import MOST_TABLED, SPAN_BYTES
from flashinfer.paper.ways import transit_slots
from flashinfer.plan.options import Decided
from flashinfer.plan.slot_shares import CachedLayer, cached_layer
from flashinfer.transformer.kv_cache import PAGE, pages
from flashinfer.transformer.kv_flash import may_lie_on_flash, part_bytes, tail_bytes
from flashinfer.transformer.mixer import MemoryWanted
from flashinfer.transformer.mixers import kind_of

THREAD = 128 << 10  # of each thread that computes: its stack, here and in the kernel
PANEL = 264  # of each, for each token of a prompt: kernels.h, down_panel
TILE_ROWS = 24  # of weights that each decodes to float32 at a time: kernels.h, PANEL_ROWS
TILE_TOKENS = 6  # that share the loading of weights, or of keys: kernels.h, MOST_TILE_TOKENS
TILE_SUMS = 768  # bytes of their sums with a row
# Of each number of a token's hidden state, on its way through a layer; 4 as tiles.h lays it out.
FEATURE = 64
LEAST_CHUNK = 8  # tokens that go through a layer together
MAX_CHUNK = 512  # tokens of a prompt that go through a layer together
SELECTED = 24  # of each unit that a drafted token uses
LEAST_SLOTS = 32  # of a layer's neurons; fewer would mean very small reads


class Sizes:
    """What the parts of a bundle take in DRAM.

    kv_on_flash the layers whose keys and values lie on flash; kv_stage: bytes of the largest
    cached      {layer: CachedLayer} of the layers whose units are chosen
    whole       {layer: bytes} of the others' FFNs, all units together
    transit     of the slots in transit that are worth having
    attention   (layers,): of each layer's, and of what else streams with it
    head_last   all else has memory before the output head, of which an encoder uses single rows
    """

    def __init__(self, bundle: Bundle, wanted: Decided, slot_bytes: Sequence[int]) -> None:
        self.wanted, self.slot_bytes = wanted, tuple(slot_bytes)
        config = bundle.config
        self.by_role = dict.fromkeys(ROLES, 0)
        self.attention = [0] * config.num_hidden_layers
        for spec in bundle.specs:
            if spec.role == PREDICTOR and wanted.mode == "dense":
                continue
            tensor = bundle.tensors[spec.name]
            size = tensor.pages_of(tensor.rows).nbytes
            self.by_role[SMALL if len(spec.shape) == 1 else spec.role] += size
            if spec.role == ATTENTION and spec.layer is not None:
                self.attention[spec.layer] += size
        self.transit = 0
        self.cached: dict[int, CachedLayer] = {}
        self.whole: dict[int, int] = {}
        for i, layer in enumerate(config.layers):
            if wanted.chooses(layer.ffn):
                # Experts that have no slot of their own pass through those in transit.
                least = 0 if layer.ffn.reads_experts else LEAST_SLOTS
                self.cached[i] = cached_layer(bundle, i, slot_bytes[i], least)
                passing = transit_slots(layer.ffn.routed_units, slot_bytes[i]) * slot_bytes[i]
                self.transit = max(self.transit, passing if layer.ffn.reads_experts else 0)
            else:
                self.whole[i] = layer.ffn.units * slot_bytes[i]
        self.experts = config.reads_experts
        self.head_last = config.encoder
        self.least_chunk, self.most_chunk = max(LEAST_CHUNK, wanted.texts), MAX_CHUNK
        if config.encoder:  # whose texts go through each layer as one
            self.least_chunk = self.most_chunk = max(LEAST_CHUNK, wanted.context)
        self.kv_on_flash = _kv_on_flash(bundle, wanted)
        layers = [config.layers[i].attention for i in self.kv_on_flash]
        self.kv_stage = max(
            (part_bytes(layer, wanted.kv_dtype, wanted.context) for layer in layers), default=0
        )
        self.kv_cache = 2 * self.kv_stage + _text_memory(config, wanted, self.kv_on_flash)
        mixers = [layer.mixer for layer in config.layers]
        if wanted.drafting:  # a state to try drafts with
            self.kv_cache += pages(4 * max(kind_of(one).state_numbers(one) for one in mixers))
        # A tile of the stream holds at least one row of anything that streams, widened.
        largest = max(widest(tensor) for tensor in bundle.tensors.values() if tensor.rows > 1)
        self.least_buffer = 2 * max(64 << 10, pages(largest) + 2 * PAGE)
        self.per_token = FEATURE * config.hidden_size + PANEL * wanted.threads
        if config.per_layer_rows:  # a token's row, decoded, its embedding, and a layer's part of it
            widest_part = max(layer.per_layer.size for layer in config.layers if layer.per_layer)
            self.per_token += 4 * (config.per_layer_width + config.hidden_size + 6 * widest_part)
        if config.hidden_states > 1:  # those of a layer, of its prediction and its correction
            self.per_token += 4 * 5 * config.hidden_states * config.hidden_size
        self.per_token += max(
            neurons.working_bytes(layer.ffn) + kind_of(layer.mixer).working_bytes(layer.mixer)
            for layer in config.layers
        )
        # Each thread has scores of some tokens, and rows of weights that it multiplies with many.
        columns = max(
            most_columns(config, spec, bundle.tensors[spec.name])
            for spec in bundle.specs
            if len(spec.shape) > 1 and spec.role != EMBEDDING
        )
        panel = TILE_ROWS * (4 * columns + TILE_SUMS)
        scores = 4 * TILE_TOKENS * (wanted.context + MAX_CHUNK)
        self.fixed = wanted.threads * (THREAD + panel + scores)
        units = [layer.ffn.units for layer in config.layers]
        self.fixed += BOOKKEEPING * sum(units) + room_bytes(bundle)
        self.fixed += SPAN_BYTES * sum(n for n in units if n <= MOST_TABLED)
        # And what sampling sorts, or sums; and the logits of texts that share a pass.
        self.logits = 24 * config.vocab_size * wanted.logit_rows
        self.logits += 4 * config.vocab_size * (wanted.texts - 1)
        # The logits after a drafted token, and which units it uses, until it is accepted.
        self.per_draft = 4 * config.vocab_size
        self.per_draft += SELECTED * sum(layer.needs[0] for layer in self.cached.values())
        # And what recurrent layers keep of it, of which the first draft brings two tokens.
        two = (
            memory_bytes(one, wanted, False, 2) - memory_bytes(one, wanted, False) for one in mixers
        )
        self.per_draft += sum(two)


def widest(tensor: StoredTensor) -> int:
    """Bytes of a tensor's row as it is streamed: of matrices, of the longest of their rows."""
    if isinstance(tensor.format, Matrices):
        return max(part.row_bytes for part in tensor.format.parts.values())
    return tensor.row_bytes


def most_columns(config: ModelConfig, spec: TensorSpec, tensor: StoredTensor) -> int:
    """Columns of the longest rows that a tensor is multiplied by."""
    if isinstance(tensor.format, Matrices):
        return max(part.columns for part in tensor.format.parts.values())
    return config.hidden_size if spec.role == FFN else tensor.columns


def _kv_on_flash(bundle: Bundle, wanted: Decided) -> tuple[int, ...]:
    """The layers whose keys and values lie on flash, spread evenly, so that each is read while
    others are computed."""
    able = [
        number
        for number, layer in enumerate(bundle.config.layers)
        if may_lie_on_flash(layer.mixer, wanted.context) and not bundle.config.encoder
    ]
    n = math.ceil(wanted.kv_share * len(able))
    return tuple(able[(2 * i + 1) * len(able) // (2 * n)] for i in range(n))


def _text_memory(config: ModelConfig, wanted: Decided, on_flash: Collection[int]) -> int:
    """Bytes in DRAM of all layers' memories of the texts, and of alibi's table, which they share.
    An encoder's layers, which keep nothing for a next token, use one memory in turn."""
    total, table = 0, 0
    if config.encoder:
        return max(memory_bytes(layer.mixer, wanted, False) for layer in config.layers)
    for number, layer in enumerate(config.layers):
        total += wanted.texts * memory_bytes(layer.mixer, wanted, number in on_flash)
        if isinstance(layer.mixer, AttentionConfig) and layer.mixer.alibi:
            table = pages(wanted.context * layer.mixer.num_attention_heads * 4)
    return total + table


def memory_bytes(config: MixerConfig, wanted: Decided, on_flash: bool, drafts: int = 0) -> int:
    """Bytes in DRAM of a layer's memory of one text: of one on flash those of the tail, and none
    where it is an earlier layer's."""
    if config.memory_of is not None:
        return 0
    if on_flash:
        assert isinstance(config, AttentionConfig)
        return tail_bytes(config, wanted.kv_dtype)
    asked = MemoryWanted(wanted.context, wanted.kv_dtype, drafts)
    return pages(kind_of(config).memory_bytes(config, asked))
