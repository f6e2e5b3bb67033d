"""A budget in bytes -> what stays in DRAM, what streams from flash, how large the window is."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.errors import BudgetError
from flashinfer.formats.layers.ffn import FFNConfig
from flashinfer.formats.tensors import (
    ATTENTION,
    EMBEDDING,
    HEAD,
    PREDICTOR,
    SMALL,
    TensorSpec,
)
from flashinfer.paper.flash import HUGE_PAGE, STAGING_BYTES, STAGINGS
from flashinfer.paper.ways import Residence, transit_slots
from flashinfer.plan import memory
from flashinfer.plan.memory import MIB
from flashinfer.plan.options import Decided
from flashinfer.plan.sizes import MAX_CHUNK, Sizes
from flashinfer.plan.slot_shares import Shares, nbytes, share_slots
from flashinfer.transformer.kv_cache import PAGE, pages
from flashinfer.transformer.kv_flash import part_bytes

RESERVE = 10 * MIB  # readers' stacks, the kernel's own pages, what Python allocates on the way
MAX_BUFFER = 8 * MIB  # two tiles of the stream
MOST_DRAFTS = 31
STAGED = STAGINGS * STAGING_BYTES


def unit_name(mode: str, config: ModelConfig) -> str:
    """What is read and kept as one, for people."""
    if mode == "routed":
        return "expert"
    whole = all(config.layers[layer].ffn.matrices for layer in config.with_neurons)
    return "FFN" if whole else "neuron"


@dataclass(frozen=True, kw_only=True)
class Plan(Decided):
    """What a budget affords; every figure in bytes unless it says otherwise.

    base              the process as it was: interpreter, NumPy, the tokenizer where it stays, and
                      where the bundle's neurons lie
    small             always in DRAM; predictor, attention, head, embeddings: what of them stays
    attention_layers  layers whose attention stays; the others' is streamed, as is what does not
                      stay of the head
    kv_cache          for ``context`` tokens, or those that layers with a window keep of them
    kv_on_flash       layers whose keys and values lie on flash, but for the last ones
    kv_stage          for one such layer's, of which there are two
    buffers           tiles of the stream; working: activations of ``chunk`` tokens, the threads'
                      stacks, and where merged reads are staged
    chunk             tokens of a prompt that go through a layer together
    slots             of each layer's neuron cache: of a layer whose units are all used always,
                      all of them or 0; cache: bytes of these and of transit
    slot_bytes        of each layer's slots
    transit           for units that are computed and not kept, which all layers use in turn; 0
                      where every layer's slots hold what a token uses
    window            tokens that a unit stays unused; None: until its slot is needed
    affords           the largest calibrated window, in tokens, that the slots hold; None: unknown
    drafts            tokens that may be drafted, and checked in one pass
    prefetch          share of what the next layer's early guess names, the surest first, that is
                      read before its turn
    """

    chunk: int
    base: int
    small: int
    predictor: int
    attention: int
    attention_layers: int
    head: int
    embeddings: int
    kv_cache: int
    kv_on_flash: tuple[int, ...]
    kv_stage: int
    buffers: int
    working: int
    slots: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    transit: int
    cache: int
    affords: int | None
    drafts: int = 0
    prefetch: float = 1.0

    def kv_flash_bytes(self, bundle: Bundle) -> int:
        """Bytes of the file for keys and values that do not stay."""
        layers = bundle.config.layers
        return self.texts * sum(
            part_bytes(layers[number].attention, self.kv_dtype, self.context)
            for number in self.kv_on_flash
        )

    @property
    def resident(self) -> int:
        return self.small + self.predictor + self.attention + self.head + self.embeddings

    @property
    def own(self) -> int:
        """All that is the model's: what the process takes beyond ``base``."""
        return self.resident + self.kv_cache + self.buffers + self.working + self.cache

    def residence(self, layer: int, ffn: FFNConfig) -> Residence:
        """What of a layer is in DRAM once the model is open."""
        chosen, slots = self.chooses(ffn), self.slots[layer]
        whole = slots == ffn.units and (self.window is None or not chosen)
        transit = 0
        if chosen and not whole and self.transit:
            each = self.slot_bytes[layer]
            transit = min(transit_slots(ffn.routed_units, each), self.transit // each)
        units, each = ffn.units, ffn.unit_neurons
        return Residence(chosen, units, each, slots, whole, transit, ffn.chooses_early)

    def rows_kept(self, spec: TensorSpec, tensor: StoredTensor) -> int:
        """How many rows of a tensor, the first ones, stay in DRAM."""
        if spec.role == HEAD:
            room = max(0, self.head - tensor.offset % PAGE)  # it may begin within a page
            return min(tensor.rows, room // tensor.row_bytes)
        return tensor.rows if self._stays(spec) else 0

    def _stays(self, spec: TensorSpec) -> bool:
        if spec.role == ATTENTION and spec.layer is not None:
            return spec.layer < self.attention_layers
        if spec.role == PREDICTOR:
            vector = len(spec.shape) == 1  # the biases always stay
            return self.mode == "predicted" and (vector or self.predictor > 0)
        return spec.role == SMALL or (spec.role == EMBEDDING and self.embeddings > 0)


class _Least(NamedTuple):
    """What a plan takes at least, in bytes: all together, and its neuron caches."""

    nbytes: int
    cache: int


def make_plan(
    bundle: Bundle, wanted: Decided, slot_bytes: Sequence[int], base: int | None = None
) -> Plan:
    """Divide ``wanted.budget`` bytes, in this order: what a model takes at least; predictors; of
    what is left a part for a prompt's chunk, the units that one token needs, and buffers;
    attention layer by layer; the output head; FFNs of which all units are always used, whole;
    further slots; and the input embeddings, where all of them fit. An encoder's output head comes
    just before these.

    slot_bytes  of a slot of each layer's neuron cache; base: bytes the process has now.
    Raises BudgetError, naming the least that works, before anything is read.
    """
    budget, sizes = wanted.budget, Sizes(bundle, wanted, slot_bytes)
    base = (memory.rss() if base is None else base) + reserve(budget)
    least = _least(sizes, base)
    if budget < least.nbytes:
        # The next process may be a little larger than this one, and its page tables too.
        named = math.ceil(least.nbytes * 512 / 511 / MIB) + 2
        raise BudgetError(
            f"{bundle.path}: --memory {budget / MIB:.0f}M is too small; the least for a context "
            f"of {wanted.context} tokens is {named}M",
            named * MIB,
        )
    small, predictor = sizes.by_role[SMALL], sizes.by_role[PREDICTOR]
    if budget < least.nbytes + predictor:  # streamed, as attention is then
        predictor = 0
    spare = budget - least.nbytes - predictor
    chunk, one_token, buffers = _for_speed(sizes, least, spare)
    drafts = _drafts(sizes, chunk, spare)
    working = sizes.per_token * max(sizes.least_chunk, chunk) + sizes.logits + STAGED + sizes.fixed
    working += drafts * sizes.per_draft
    least_cache = least.cache + one_token
    left = budget - base - small - sizes.kv_cache - predictor - buffers - working - least_cache
    attention_layers = _first_that_fit(sizes.attention, left)
    attention_bytes = sum(sizes.attention[:attention_layers])
    left -= attention_bytes
    head = 0
    if attention_layers == len(sizes.attention) and not sizes.head_last:
        head = min(sizes.by_role[HEAD], left // PAGE * PAGE)
    left -= head
    shares, transit = _share(sizes, left, left + least_cache)
    cache = sum(n * size for n, size in zip(shares.slots, slot_bytes, strict=True)) + transit
    left += least_cache - cache
    if sizes.head_last:
        head = min(sizes.by_role[HEAD], left // PAGE * PAGE)
        left -= head
    embeddings = sizes.by_role[EMBEDDING]
    if embeddings > left:
        embeddings = 0
    return Plan(
        **{**vars(wanted), "window": shares.window},
        chunk=chunk,
        base=base,
        small=small,
        predictor=predictor,
        attention=attention_bytes,
        attention_layers=attention_layers,
        head=head,
        embeddings=embeddings,
        kv_cache=sizes.kv_cache,
        kv_on_flash=sizes.kv_on_flash,
        kv_stage=sizes.kv_stage,
        buffers=buffers,
        working=working,
        slots=tuple(shares.slots),
        slot_bytes=tuple(slot_bytes),
        transit=transit,
        cache=cache,
        affords=shares.affords,
        drafts=drafts,
    )


def _drafts(sizes: Sizes, chunk: int, spare: int) -> int:
    """How many tokens may be drafted, for whose logits some of ``spare`` bytes are set aside."""
    if not sizes.wanted.drafting:
        return 0
    return max(0, min(MOST_DRAFTS, chunk - 1, spare // 32 // sizes.per_draft))


def reserve(budget: int) -> int:
    """Bytes that are set aside for what is not planned, and for page tables."""
    return RESERVE + budget // 512


def _first_that_fit(sizes: Sequence[int], room: int) -> int:
    """How many of these, the first ones, are together at most ``room``."""
    return sum(total <= room for total in itertools.accumulate(sizes))


def _share(sizes: Sizes, left: int, room: int) -> tuple[Shares, int]:
    """(the Shares of all layers, bytes of transit slots).

    left  bytes that nothing needs yet; room: the same and what neuron caches have already
    """
    slots = [0] * len(sizes.slot_bytes)
    # Of a layer whose units are all used every byte in DRAM saves one: so whole ones come first.
    for layer, size in sizes.whole.items():
        if size <= left:
            slots[layer] = size // sizes.slot_bytes[layer]
            left, room = left - size, room - size
    wanted, cached, transit = sizes.wanted, list(sizes.cached.values()), 0
    shares = share_slots(cached, room, wanted.policy, wanted.window, wanted.fewest_reads)
    short = any(n < layer.needs[0] for n, layer in zip(shares.slots, cached, strict=True))
    if short and sizes.transit:
        transit = min(sizes.transit, room)
        shares = share_slots(cached, room - transit, wanted.policy, wanted.window, passing=True)
    for layer, n in zip(sizes.cached, shares.slots, strict=True):
        slots[layer] = n
    return shares._replace(slots=slots), transit


def _least(sizes: Sizes, base: int) -> _Least:
    """The _Least of a model: of experts one slot in transit."""
    cached = list(sizes.cached.values())
    cache = pages(nbytes(cached, [layer.least for layer in cached]))
    if sizes.transit:
        cache = pages(max(layer.slot_bytes for layer in cached))
    least = base + sizes.by_role[SMALL] + sizes.kv_cache + sizes.least_buffer + STAGED
    least += sizes.per_token * sizes.least_chunk + sizes.logits + sizes.fixed
    return _Least(least + cache, cache)


def _for_speed(sizes: Sizes, least: _Least, spare: int) -> tuple[int, int, int]:
    """Of ``spare`` bytes what comes before attention: (tokens of a prompt that go through a layer
    together, bytes of slots that one token needs, of buffers)."""
    first = sizes.wanted.experts_first
    # Each chunk of a prompt reads nearly all experts of a mixture: large ones, then.
    share = 8 if first else 6
    chunk_bytes = min(spare // share, sizes.per_token * MAX_CHUNK) if sizes.experts else 0
    spare -= chunk_bytes
    # Then what one token needs: with fewer slots it comes in waves, and nothing is prefetched.
    cached = list(sizes.cached.values())
    one_token = pages(nbytes(cached, [layer.slots_for(1) for layer in cached]))
    one_token = max(0, one_token - least.cache)
    if not sizes.experts:
        one_token = min(one_token, spare * 3 // 4)
    elif first:
        one_token = min(one_token, spare * 15 // 16)
    elif one_token + sum(sizes.attention) + sizes.by_role[HEAD] + MAX_BUFFER > spare:
        # Of attention each byte in DRAM saves one of every token, of few experts less than half.
        one_token = 0
    spare -= one_token
    buffers = spare // (4 if first else 8) // PAGE * PAGE
    buffers = min(MAX_BUFFER, sizes.least_buffer + buffers)
    if buffers > HUGE_PAGE:
        buffers = max(sizes.least_buffer, buffers // HUGE_PAGE * HUGE_PAGE)
    chunk_bytes = chunk_bytes or spare // 16
    most = max(sizes.wanted.texts, min(sizes.most_chunk, sizes.wanted.context))
    return min(most, sizes.least_chunk + chunk_bytes // sizes.per_token), one_token, buffers
