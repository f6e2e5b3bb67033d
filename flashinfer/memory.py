"""A budget in bytes -> what stays in DRAM, what streams from flash, how large the window is."""

import itertools
import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashinfer.attention import padded_width
from flashinfer.flash import HUGE_PAGE, STAGING_BYTES, STAGINGS
from flashinfer.formats.bundle import CAPACITIES, WINDOWS
from flashinfer.formats.errors import BudgetError, UserError
from flashinfer.formats.layout import ATTENTION, EMBEDDING, FFN, HEAD, PREDICTOR, SMALL, head_name

MIB = 1 << 20
PAGE = 4096
RESERVE = 10 * MIB  # threads' stacks, the kernel's own pages, what Python allocates on the way
MAX_BUFFER = 8 * MIB  # two tiles of the stream
MAX_CHUNK = 512  # tokens of a prompt that go through a layer together
LEAST_CHUNK = 8
LEAST_ROWS = 32  # of a layer's neuron cache; fewer would mean very small reads
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text):
    """Bytes of "600M", "1.5G", "2GiB" or 629145600; K, M, G are powers of 1024, as cgroups'."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(text), re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"memory {text!r} is not a size such as 600M or 1.5G")
    return int(float(match[1]) * UNITS[match[2].upper()])


def format_size(nbytes):
    return f"{nbytes / MIB:,.1f} MiB" if nbytes < 10 * MIB else f"{nbytes / MIB:,.0f} MiB"


def default_budget():
    """The memory cgroup's limit or what the system has available, less a margin of 5 %."""
    available = _meminfo("MemAvailable")
    limits = [available + rss()] if available else []
    limits += _cgroup_limits()
    if not limits:
        raise UserError("cannot tell how much memory there is; give --memory")
    return int(min(limits) * 0.95)


def rss():
    """Bytes of DRAM that this process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return peak_rss()


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

    base              the process as it was: interpreter, NumPy, tokenizer
    small             always in DRAM; predictor, attention, head, embeddings: what of them stays
    attention_layers  layers whose attention stays; the others' is streamed
    kv_cache          for ``context`` tokens
    buffers           tiles of the stream; working: activations of ``chunk`` tokens,
                      and where merged reads are staged
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
    ahead: float = 1.0

    @property
    def resident(self):
        return self.small + self.predictor + self.attention + self.head + self.embeddings

    def stays(self, spec):
        """Whether a TensorSpec's tensor is kept whole in DRAM."""
        if spec.role == ATTENTION:
            return int(spec.name.split(".")[1]) < self.attention_layers
        if spec.role == PREDICTOR:
            vector = len(spec.shape) == 1  # the biases always stay
            return self.neurons == "predicted" and (vector or self.predictor > 0)
        return (
            spec.role == SMALL
            or (spec.role == HEAD and self.head > 0)
            or (spec.role == EMBEDDING and self.embeddings > 0)
        )


class Sizes:
    """What the parts of a bundle take in DRAM."""

    def __init__(self, bundle, context, neurons, stride):
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
        self.per_token += 8 * width
        self.logits = 24 * config.vocab_size  # and what sampling sorts
        self.head = by_role[HEAD] if head_name(config) in bundle.tensors else 0


def kv_dtype(bundle):
    """Keys and values are kept in float32 where the attention's weights are, else in float16."""
    exact = bundle.tensors["layers.0.q_proj.weight"].format.name == "f32"
    return np.dtype(np.float32 if exact else np.float16)


def pages(nbytes):
    return -(-nbytes // PAGE) * PAGE


def make_plan(bundle, budget, context, neurons, policy, window, stride, base=None):
    """Divide ``budget`` bytes; return a Plan.

    policy  one of neuron_cache.POLICIES; window: in tokens, or None
    stride  bytes of a row of the neuron cache; base: bytes the process has now.
    Raises BudgetError, naming the least that works, before anything is read.
    """
    sizes = Sizes(bundle, context, neurons, stride)
    base = (rss() if base is None else base) + RESERVE + budget // 512  # page tables
    least_rows = 0 if neurons == "dense" else min(LEAST_ROWS, sizes.units)
    if bundle.config.reads_experts:
        least_rows = 1  # large enough
    shared_rows, least_cache = 0, pages(sizes.layers * least_rows * stride)
    small, predictor = sizes.by_role[SMALL], sizes.by_role[PREDICTOR]
    fixed = base + small + sizes.kv_cache
    staging = STAGINGS * STAGING_BYTES
    least = fixed + sizes.least_buffer + sizes.per_token * LEAST_CHUNK + sizes.logits + least_cache
    least += staging
    if budget < least and bundle.config.reads_experts:  # not one for each layer: one in turn, then
        least -= least_cache
        least_rows, shared_rows, least_cache = 0, 1, pages(stride)
        least += least_cache
    if budget < least:
        # The next process may be a little larger than this one, and its page tables too.
        named = math.ceil(least * 512 / 511 / MIB) + 2
        raise BudgetError(
            f"{bundle.path}: --memory {budget / MIB:.0f}M is too small; the least for a context "
            f"of {context} tokens is {named}M",
            named * MIB,
        )
    if budget < least + predictor:  # streamed, as attention is then
        predictor = 0
    fixed += predictor
    spare = budget - least - predictor
    # Each chunk of a prompt reads nearly all experts of a mixture: large ones, then.
    chunk_bytes = min(spare // 6, sizes.per_token * MAX_CHUNK) if bundle.config.reads_experts else 0
    spare -= chunk_bytes
    # Then what one token needs: with fewer rows it comes in waves, and nothing is read ahead.
    one_token = 0
    if neurons != "dense":
        one_token = stride * sum(_rows_for(need, 1, sizes.units) for need in window_needs(bundle))
    one_token = min(max(0, pages(one_token) - least_cache), spare * 3 // 4)
    spare -= one_token
    least_cache += one_token
    buffers = min(MAX_BUFFER, sizes.least_buffer + spare // 8 // PAGE * PAGE)
    if buffers > HUGE_PAGE:
        buffers = max(sizes.least_buffer, buffers // HUGE_PAGE * HUGE_PAGE)
    chunk_bytes = chunk_bytes or spare // 16
    chunk = min(MAX_CHUNK, context, LEAST_CHUNK + chunk_bytes // sizes.per_token)
    working = sizes.per_token * max(LEAST_CHUNK, chunk) + sizes.logits + staging
    left = budget - fixed - buffers - working - least_cache
    attention_layers = min(sizes.layers, left // max(1, sizes.attention_layer))
    attention = attention_layers * sizes.attention_layer
    left -= attention
    head = sizes.head if attention_layers == sizes.layers and left >= sizes.head else 0
    left -= head
    if shared_rows and left >= stride:  # one is read while the other is computed
        shared_rows = 2
    room = (left + least_cache) // stride - shared_rows
    rows, window, affords = _cache_rows(bundle, sizes, room, policy, window, least_rows)
    embeddings = sizes.by_role[EMBEDDING]
    cache = (sum(rows) + shared_rows) * stride
    if embeddings > left + least_cache - cache:
        embeddings = 0
    return Plan(
        budget=budget,
        neurons=neurons,
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
    )


def _cache_rows(bundle, sizes, room, policy, window, least_rows):
    """Share ``room`` rows among the layers; return (rows of each, window, the window they hold)."""
    layers, units = sizes.layers, sizes.units
    if sizes.neurons == "dense":  # whole layers, as many as fit
        whole = min(layers, room // units)
        return (units,) * whole + (0,) * (layers - whole), None, None
    needs = window_needs(bundle)  # [layer][k - 1]: the most rows that k tokens used
    if policy == "window" and window is None:
        windows = range(1, len(needs[0]) + 1)
        fitting = (k for k in windows if sum(_rows_for(n, k, units) for n in needs) <= room)
        window = max(fitting, default=1)
    if window is None and room >= layers * units:
        return (units,) * layers, None, None
    if window is not None:
        shape = [_rows_for(need, window, units) for need in needs]
        rows = _in_proportion(shape, min(room, sum(shape)), least_rows, units)
    elif bundle.calibration is None:
        rows = _in_proportion([1] * layers, room, least_rows, units)
    else:
        rows = _fewest_misses(bundle.calibration["layers"], room, least_rows, units)
    holds = [
        k
        for k in range(1, len(needs[0]) + 1)
        if all(r >= need[k - 1] for r, need in zip(rows, needs, strict=True))
    ]
    return rows, window, max(holds, default=None)


def _fewest_misses(calibrated, room, least, most):
    """The split of ``room`` rows for which the layers' miss curves promise the fewest reads.

    First every layer gets what a single token needs, as far as it goes.
    """
    shape = [_rows_for(layer["window_rows_most"], 1, most) for layer in calibrated]
    rows = list(_in_proportion(shape, min(room, sum(shape)), least, most))
    left = room - sum(rows)
    pieces = []  # (reads saved per row, layer, rows)
    for number, layer in enumerate(calibrated):
        points = [(c * most, m) for c, m in zip(CAPACITIES, layer["misses"], strict=True)]
        begin = (rows[number], np.interp(rows[number], *zip(*points, strict=True)))
        hull = _lower_hull([begin] + [p for p in points if p[0] > begin[0]])
        for (r0, m0), (r1, m1) in itertools.pairwise(hull):
            pieces.append(((m0 - m1) / (r1 - r0), number, int(r1) - int(r0)))
    # A hull is convex, so that a layer's pieces come in their own order.
    for _, number, size in sorted(pieces, key=lambda piece: -piece[0]):
        size = min(size, left)
        rows[number] += size
        left -= size
    return tuple(rows)


def _lower_hull(points):
    """The points of the convex curve below these; their first co-ordinates rise."""
    hull = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def window_needs(bundle):
    """Per layer, the most rows that 1, 2, ... tokens used when calibrated, or may use."""
    config, units = bundle.config, bundle.config.units
    if bundle.calibration is None:
        known = [min(units, k * config.experts_per_token) for k in range(1, WINDOWS + 1)]
        return [known if config.experts else [units]] * config.num_hidden_layers
    return [
        [min(units, max(1, int(n))) for n in layer["window_rows_most"]]
        for layer in bundle.calibration["layers"]
    ]


def _rows_for(need, window, units):
    """Rows for a window of k tokens: the most that it needed when calibrated and a tenth more;
    beyond the windows calibrated, by what the last token added."""
    slope = need[-1] - need[-2] if len(need) > 1 else need[-1]
    beyond = max(0, window - len(need)) * slope
    return min(units, math.ceil(1.1 * (need[min(window, len(need)) - 1] + beyond)))


def _in_proportion(shape, room, least, most):
    """Rows in proportion to ``shape``, each at least ``least`` and at most ``most``, in all
    at most ``room``."""
    low, high = 0.0, most / max(1, min(shape))
    for _ in range(60):
        scale = (low + high) / 2
        rows = [max(least, min(most, int(scale * s))) for s in shape]
        low, high = (scale, high) if sum(rows) <= room else (low, scale)
    return tuple(max(least, min(most, int(low * s))) for s in shape)
