"""A budget in bytes -> what stays in DRAM, what streams from flash, how large the window is."""

import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashinfer.attention import padded_width
from flashinfer.flash import HUGE_PAGE, STAGING_BYTES, STAGINGS
from flashinfer.formats.errors import BudgetError, UserError
from flashinfer.formats.layout import ATTENTION, EMBEDDING, FFN, HEAD, PREDICTOR, SMALL
from flashinfer.row_shares import rows_for, share_rows, window_needs

MIB = 1 << 20
PAGE = 4096
RESERVE = 10 * MIB  # readers' stacks, the kernel's own pages, what Python allocates on the way
THREAD = 128 << 10  # of each thread that computes: its stack, here and in the kernel
PANEL = 264  # of each, for each token of a prompt: kernels.h, down_panel
MAX_BUFFER = 8 * MIB  # two tiles of the stream
MAX_CHUNK = 512  # tokens of a prompt that go through a layer together
LEAST_CHUNK = 8
STAGED = STAGINGS * STAGING_BYTES
LEAST_ROWS = 32  # of a layer's neuron cache; fewer would mean very small reads
LEAST_HEADER = 16 * MIB  # enough for any but huge models, so that it is the plan that refuses
MOST_BYTES = (1 << 63) - 1
SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text):
    """Bytes of "600M", "1.5G", "2GiB" or 629145600; K, M, G are powers of 1024, as cgroups'."""
    nbytes = 0
    if isinstance(text, int) and not isinstance(text, bool):
        nbytes = text
    elif match := SIZE.fullmatch(str(text)):
        nbytes = int(float(match[1]) * UNITS[match[2].upper()])
    if not 1 <= nbytes <= MOST_BYTES:
        raise UserError(f"memory {str(text)[:40]!r} is not a size such as 600M or 1.5G")
    return nbytes


def header_room(budget=None):
    """Bytes that parsing a bundle's header may take, of a budget or of what the machine has."""
    budget = default_budget() if budget is None else parse_size(budget)
    return max(LEAST_HEADER, budget - rss())


def format_size(nbytes):
    return f"{nbytes / MIB:,.1f} MiB" if nbytes < 10 * MIB else f"{nbytes / MIB:,.0f} MiB"


def unit_name(neurons):
    """What is read and kept as one, for people, by ``Plan.neurons``."""
    return "expert" if neurons == "routed" else "neuron"


def default_budget():
    """The memory cgroup's limit or what the system has available, less a margin of 5 %."""
    available = _meminfo("MemAvailable")
    now = sum(held(pid)[1] for pid in ("self", *list(helpers)))
    limits = [available + now] if available else []
    limits += _cgroup_limits()
    if not limits:
        raise UserError("cannot tell how much memory there is; give --memory")
    return int(min(limits) * 0.95)


# Bytes set aside for each process that works for this one, by its id: see worker.Worker.
helpers = {}


def rss():
    """Bytes of DRAM that this process and its helpers hold now, with what is set aside for them."""
    own = held()[1] or peak_rss()
    return own + sum(max(held(pid)[1], aside) for pid, aside in list(helpers.items()))


def held(pid="self"):
    """(bytes of address space, of DRAM) that a process has now; 0 where no system tells."""
    try:
        pages_held = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0, 0
    return tuple(int(n) * mmap.PAGESIZE for n in pages_held[:2])


def peak_rss():
    """The most bytes of DRAM that this process ever held."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _meminfo(key):
    try:
        match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _cgroup_limits(proc=Path("/proc/self/cgroup"), root=Path("/sys/fs/cgroup")):
    """The limits of the memory cgroups, v1 or v2, that this process is in, and of their parents."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            bases, name = {root, root / "unified"}, "memory.max"
        elif "memory" in controllers.split(","):
            bases, name = {root / "memory", root / controllers}, "memory.limit_in_bytes"
        else:
            continue
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):
            for base in bases:
                try:
                    text = (base / folder / name).read_text().strip()
                except OSError:
                    continue
                if text.isdigit() and int(text) < 1 << 60:
                    limits.append(int(text))
    return limits


@dataclass(frozen=True)
class Plan:
    """What a budget affords; every figure in bytes unless it says otherwise.

    base              the process as it was: interpreter, NumPy, the tokenizer where it stays
    small             always in DRAM; predictor, attention, head, embeddings: what of them stays
    attention_layers  layers whose attention stays; the others' is streamed, as is what does not
                      stay of the head
    kv_cache          for ``context`` tokens
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
    def resident(self):
        return self.small + self.predictor + self.attention + self.head + self.embeddings

    def rows_kept(self, spec, tensor):
        """How many rows of a tensor, the first ones, stay in DRAM."""
        if spec.role == HEAD:
            return min(tensor.rows, self.head // tensor.row_bytes)
        return tensor.rows if self._stays(spec) else 0

    def _stays(self, spec):
        if spec.role == ATTENTION:
            return int(spec.name.split(".")[1]) < self.attention_layers
        if spec.role == PREDICTOR:
            vector = len(spec.shape) == 1  # the biases always stay
            return self.neurons == "predicted" and (vector or self.predictor > 0)
        return spec.role == SMALL or (spec.role == EMBEDDING and self.embeddings > 0)


class Sizes:
    """What the parts of a bundle take in DRAM."""

    def __init__(self, bundle, context, neurons, threads, stride, logit_rows):
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
        keys = padded * config.num_key_value_heads
        self.kv_cache = 2 * self.layers * pages(context * keys * item)
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


def kv_dtype(bundle):
    """Keys and values are kept in float32 where the attention's weights are, else in float16."""
    exact = bundle.tensors["layers.0.q_proj.weight"].format.name == "f32"
    return np.dtype(np.float32 if exact else np.float16)


def pages(nbytes):
    return -(-nbytes // PAGE) * PAGE


def make_plan(
    bundle, budget, context, neurons, policy, window, stride, threads=1, logit_rows=1, base=None
):  # fmt: skip
    """Divide ``budget`` bytes; return a Plan.

    policy  one of neuron_cache.POLICIES; window: in tokens, or None; threads: that compute;
            logit_rows: tokens whose logits are there at a time
    stride  bytes of a row of the neuron cache; base: bytes the process has now.
    Raises BudgetError, naming the least that works, before anything is read.
    """
    sizes = Sizes(bundle, context, neurons, threads, stride, logit_rows)
    base = (rss() if base is None else base) + RESERVE + budget // 512  # page tables
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
    rows, window, affords = share_rows(bundle, neurons, room, policy, window, least.rows)
    embeddings = sizes.by_role[EMBEDDING]
    cache = (sum(rows) + shared_rows) * stride
    if embeddings > left + least_cache - cache:
        embeddings = 0
    return Plan(
        budget=budget,
        neurons=neurons,
        threads=threads,
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
        policy=policy,
        window=window,
        affords=affords,
        logit_rows=logit_rows,
    )


@dataclass
class _Least:
    """What a plan takes at least: in bytes all together; rows of each layer's cache, or
    ``shared_rows`` for all of them in turn, and their bytes."""

    nbytes: int
    rows: int
    shared_rows: int
    cache: int


def _least(sizes, base, budget):
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


def _for_speed(bundle, sizes, least, spare):
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
