"""A budget in bytes -> what stays in DRAM, what streams from flash, how large the window is."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashinfer.formats.bundle.layout import (
    ATTENTION,
    EMBEDDING,
    FFN,
    HEAD,
    PREDICTOR,
    SMALL,
    TensorSpec,
)
from flashinfer.formats.bundle.reader import Bundle, StoredTensor
from flashinfer.formats.errors import BudgetError
from flashinfer.paper.flash import HUGE_PAGE, STAGING_BYTES, STAGINGS
from flashinfer.plan import memory
from flashinfer.plan.memory import MIB
from flashinfer.plan.options import Decided
from flashinfer.plan.row_shares import rows_for, share_rows, window_needs
from flashinfer.transformer.kv_cache import kept_tokens, kv_bytes, padded_width

PAGE = 4096
RESERVE = 10 * MIB  # readers' stacks, the kernel's own pages, what Python allocates on the way
THREAD = 128 << 10  # of each thread that computes: its stack, here and in the kernel
PANEL = 264  # of each, for each token of a prompt: kernels.h, down_panel
MAX_BUFFER = 8 * MIB  # two tiles of the stream
MAX_CHUNK = 512  # tokens of a prompt that go through a layer together
LEAST_CHUNK = 8
STAGED = STAGINGS * STAGING_BYTES
LEAST_ROWS = 32  # of a layer's neuron cache; fewer would mean very small reads


def unit_name(neurons: str) -> str:
    """What is read and kept as one, for people, by ``Plan.neurons``."""
    return "expert" if neurons == "routed" else "neuron"


@dataclass(frozen=True)
class Plan:
    """What a budget affords; every figure in bytes unless it says otherwise.

    base              the process as it was: interpreter, NumPy, the tokenizer where it stays
    small             always in DRAM; predictor, attention, head, embeddings: what of them stays
    attention_layers  layers whose attention stays; the others' is streamed, as is what does not
                      stay of the head
    kv_cache          for ``context`` tokens, or those that layers with a window keep of them
    threads           that compute; logit_rows: tokens whose logits are there at a time
    buffers           tiles of the stream; working: activations of ``chunk`` tokens, the threads'
                      stacks, and where merged reads are staged
    cache_rows        rows of each layer's neuron cache; shared_rows: those that layers without
                      any take turns with; cache: bytes of both
    policy            which neuron makes room, see neuron_cache.POLICIES
    window            tokens that a neuron stays unused; None: until its row is needed
    affords           the largest calibrated window, in tokens, that the rows hold; None: unknown
    ahead             share of what the next layer's early guess names, the surest first, that is
                      read before its turn
    """

    budget: int
    neurons: str
    threads: int
    context: int
    chunk: int
    base: int
    small: int
    predictor: int
    attention: int
    attention_layers: int
    head: int
    embeddings: int
    kv_cache: int
    buffers: int
    working: int
    cache_rows: tuple[int, ...]
    shared_rows: int
    cache: int
    policy: str
    window: int | None
    affords: int | None
    logit_rows: int = 1
    ahead: float = 1.0

    @property
    def resident(self) -> int:
        return self.small + self.predictor + self.attention + self.head + self.embeddings

    def rows_kept(self, spec: TensorSpec, tensor: StoredTensor) -> int:
        """How many rows of a tensor, the first ones, stay in DRAM."""
        if spec.role == HEAD:
            return min(tensor.rows, self.head // tensor.row_bytes)
        return tensor.rows if self._stays(spec) else 0

    def _stays(self, spec: TensorSpec) -> bool:
        if spec.role == ATTENTION:
            return int(spec.name.split(".")[1]) < self.attention_layers
        if spec.role == PREDICTOR:
            vector = len(spec.shape) == 1  # the biases always stay
            return self.neurons == "predicted" and (vector or self.predictor > 0)
        return spec.role == SMALL or (spec.role == EMBEDDING and self.embeddings > 0)


class Sizes:
    """What the parts of a bundle take in DRAM."""

    def __init__(
        self, bundle: Bundle, context: int, neurons: str, threads: int, stride: int, logit_rows: int
    ) -> None:
        config = self.config = bundle.config
        self.neurons, self.context, self.stride = neurons, context, stride
        self.layers, self.units = config.num_hidden_layers, config.units
        by_role = dict.fromkeys((SMALL, PREDICTOR, ATTENTION, HEAD, EMBEDDING, FFN), 0)
        for spec in bundle.specs:
            if spec.role == PREDICTOR and neurons == "dense":
                continue
            role = SMALL if len(spec.shape) == 1 else spec.role
            by_role[role] += pages(bundle.tensors[spec.name].nbytes)
        self.by_role = by_role
        self.attention_layer = by_role[ATTENTION] // self.layers
        item = kv_dtype(bundle).itemsize
        padded = padded_width(config.head_dim)
        tokens = [kept_tokens(config, layer, context) for layer in range(self.layers)]
        self.kv_cache = sum(2 * pages(kv_bytes(config, n, item)) for n in tokens)
        width = padded * config.num_attention_heads
        # A tile of the stream holds at least one row of anything that streams, widened.
        largest = max(tensor.row_bytes for tensor in bundle.tensors.values() if tensor.rows > 1)
        self.least_buffer = 2 * max(64 << 10, pages(largest) + 2 * PAGE)
        if config.positions == "alibi":
            self.kv_cache += pages(context * config.num_attention_heads * 4)
        per_neuron, per_feature = 24 if config.gated else 16, 64
        # Experts come one by one; else all neurons' activations are there at once.
        active = config.unit_neurons if config.reads_experts else config.d_ffn
        self.per_token = per_neuron * (active + config.shared_d_ffn)
        self.per_token += per_feature * config.hidden_size
        self.per_token += 8 * width + PANEL * threads
        # Each thread has scores of its own.
        self.threads = threads * (THREAD + 4 * (context + MAX_CHUNK))
        self.logits = 24 * config.vocab_size * logit_rows  # and what sampling sorts, or sums
        self.head = by_role[HEAD]


def kv_dtype(bundle: Bundle) -> np.dtype[Any]:
    """Keys and values are kept in float32 where the attention's weights are, else in float16."""
    exact = bundle.tensors["layers.0.q_proj.weight"].format.name == "f32"
    return np.dtype(np.float32 if exact else np.float16)


def pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def make_plan(bundle: Bundle, wanted: Decided, stride: int, base: int | None = None) -> Plan:
    """Divide ``wanted.budget`` bytes.

    stride  bytes of a slot of the neuron cache; base: bytes the process has now.
    Raises BudgetError, naming the least that works, before anything is read.
    """
    budget, context, mode = wanted.budget, wanted.context, wanted.mode
    sizes = Sizes(bundle, context, mode, wanted.threads, stride, wanted.logit_rows)
    base = (memory.rss() if base is None else base) + RESERVE + budget // 512  # page tables
    least = _least(sizes, base, budget)
    if budget < least.nbytes:
        # The next process may be a little larger than this one, and its page tables too.
        named = math.ceil(least.nbytes * 512 / 511 / MIB) + 2
        raise BudgetError(
            f"{bundle.path}: --memory {budget / MIB:.0f}M is too small; the least for a context "
            f"of {context} tokens is {named}M",
            named * MIB,
        )
    small, predictor = sizes.by_role[SMALL], sizes.by_role[PREDICTOR]
    if budget < least.nbytes + predictor:  # streamed, as attention is then
        predictor = 0
    spare = budget - least.nbytes - predictor
    chunk, one_token, buffers = _for_speed(bundle, sizes, least, spare)
    working = sizes.per_token * max(LEAST_CHUNK, chunk) + sizes.logits + STAGED + sizes.threads
    least_cache = least.cache + one_token
    left = budget - base - small - sizes.kv_cache - predictor - buffers - working - least_cache
    attention_layers = min(sizes.layers, left // max(1, sizes.attention_layer))
    attention = attention_layers * sizes.attention_layer
    left -= attention
    head = min(sizes.head, left // PAGE * PAGE) if attention_layers == sizes.layers else 0
    left -= head
    # Where one is read while the other is computed there are two.
    shared_rows = 2 if least.shared_rows and left >= stride else least.shared_rows
    room = (left + least_cache) // stride - shared_rows
    rows, window, affords = share_rows(bundle, mode, room, wanted.policy, wanted.window, least.rows)
    embeddings = sizes.by_role[EMBEDDING]
    cache = (sum(rows) + shared_rows) * stride
    if embeddings > left + least_cache - cache:
        embeddings = 0
    return Plan(
        budget=budget,
        neurons=mode,
        threads=wanted.threads,
        context=context,
        chunk=chunk,
        base=base,
        small=small,
        predictor=predictor,
        attention=attention,
        attention_layers=attention_layers,
        head=head,
        embeddings=embeddings,
        kv_cache=sizes.kv_cache,
        buffers=buffers,
        working=working,
        cache_rows=rows,
        shared_rows=shared_rows,
        cache=cache,
        policy=wanted.policy,
        window=window,
        affords=affords,
        logit_rows=wanted.logit_rows,
    )


@dataclass
class _Least:
    """What a plan takes at least: in bytes all together; rows of each layer's cache, or
    ``shared_rows`` for all of them in turn, and their bytes."""

    nbytes: int
    rows: int
    shared_rows: int
    cache: int


def _least(sizes: Sizes, base: int, budget: int) -> _Least:
    """The _Least of a model: a row for each layer where ``budget`` has them."""
    rows = 0 if sizes.neurons == "dense" else min(LEAST_ROWS, sizes.units)
    if sizes.config.reads_experts:
        rows = 1  # large enough
    cache, one = pages(sizes.layers * rows * sizes.stride), pages(sizes.stride)
    nbytes = base + sizes.by_role[SMALL] + sizes.kv_cache + sizes.least_buffer + STAGED
    nbytes += sizes.per_token * LEAST_CHUNK + sizes.logits + sizes.threads
    if budget < nbytes + cache and sizes.config.reads_experts:
        return _Least(nbytes + one, 0, 1, one)
    return _Least(nbytes + cache, rows, 0, cache)


def _for_speed(bundle: Bundle, sizes: Sizes, least: _Least, spare: int) -> tuple[int, int, int]:
    """Of ``spare`` bytes what comes before attention: (tokens of a prompt that go through a layer
    together, bytes of rows that one token needs, of buffers)."""
    # Each chunk of a prompt reads nearly all experts of a mixture: large ones, then.
    experts = sizes.config.reads_experts
    chunk_bytes = min(spare // 6, sizes.per_token * MAX_CHUNK) if experts else 0
    spare -= chunk_bytes
    # Then what one token needs: with fewer rows it comes in waves, and nothing is read ahead.
    one_token = 0
    if sizes.neurons != "dense":
        needs = window_needs(bundle)
        one_token = pages(sizes.stride * sum(rows_for(need, 1, sizes.units) for need in needs))
    one_token = min(max(0, one_token - least.cache), spare * 3 // 4)
    spare -= one_token
    buffers = min(MAX_BUFFER, sizes.least_buffer + spare // 8 // PAGE * PAGE)
    if buffers > HUGE_PAGE:
        buffers = max(sizes.least_buffer, buffers // HUGE_PAGE * HUGE_PAGE)
    chunk_bytes = chunk_bytes or spare // 16
    chunk = min(MAX_CHUNK, sizes.context, LEAST_CHUNK + chunk_bytes // sizes.per_token)
    return chunk, one_token, buffers
