"""What a pass will cost: bytes and seconds by part, from a plan and a device's profile."""

import math
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import numpy as np

from flashinfer.formats.bundle.calibration import CAPACITIES, WINDOWS, LayerCalibration
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.formats.tensors import ATTENTION, HEAD, PREDICTOR, Role, TensorSpec
from flashinfer.paper.flash import PIECE_BYTES, tile_rows
from flashinfer.paper.pieces import pieces_of_layer
from flashinfer.paper.ways import (
    CACHED,
    STREAMED,
    WAVES,
    WHOLE,
    Residence,
    may_prefetch,
    prefetch_fits,
    prefetch_waits,
    reads_early,
    wave_size,
    way_to_run,
)  # fmt: skip
from flashinfer.plan.draws import SAMPLES, Draws
from flashinfer.plan.expected_reads import expected_reads
from flashinfer.plan.plan import Plan
from flashinfer.plan.profile import Profile
from flashinfer.plan.timeline import STREAMS, Timeline
from flashinfer.transformer.mixer import MemoryWanted
from flashinfer.transformer.mixers import kind_of

PARTS: dict[Role, str] = {ATTENTION: "attention", PREDICTOR: "predictors", HEAD: "output head"}
KEY_VALUES = "keys and values"
GUESSED = 0.8  # of what a layer uses is guessed one layer early, where calibration does not say


@dataclass(frozen=True)
class Cost:
    """Of one pass, which is that of one token unless ``predict`` is asked for more.

    read      {part: bytes from flash}; requests: reads of neurons or experts
    seconds   {part: seconds}: computing, and what reads take beyond it
    """

    read: dict[str, float]
    requests: float
    seconds: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.read.values())

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.total


def predict(
    bundle: Bundle,
    plan: Plan,
    profile: Profile,
    gap_bytes: int,
    block: int = 512,
    tokens: int = 1,
) -> Cost:
    """The Cost of a pass of ``tokens`` tokens in the middle of the context, all of which give
    logits, or of an encoder hidden states.

    gap_bytes  neurons no further apart are read as one; block: bytes that reads are aligned to

    Of a token's neurons so many are missing that their mean is enough. Of its experts one layer
    misses none and another one two, which takes longer than one each: the seconds are the mean of
    SAMPLES tokens, whose missing experts are drawn.
    """
    a_pass = partial(_Pass, bundle, plan, profile, gap_bytes, block, tokens)
    cost = _cost_of(a_pass(None))
    if tokens > 1 or not bundle.config.reads_experts:
        return cost
    samples = [_cost_of(a_pass(n)).seconds for n in range(SAMPLES)]
    parts = dict.fromkeys(part for one in (cost.seconds, *samples) for part in one)
    seconds = {part: fmean(one.get(part, 0.0) for one in samples) for part in parts}
    return replace(cost, seconds=seconds)


def _cost_of(work: "_Pass") -> Cost:
    bundle, early = work.bundle, None
    for number in range(bundle.config.num_hidden_layers):
        known = work.read_known(number)
        work.mix(number)
        early = work.feed_forward(number, early, known)
    if not bundle.config.encoder:
        work.multiply(HEAD)
    return Cost(work.read, work.requests, dict(work.line.seconds))


@dataclass
class _Units:
    """What a layer's FFN does in a pass.

    layer     its number; residence: what of it is in DRAM; way: that it runs, see ways.py
    used      units, of which some are missing in the cache; seconds: of computing them
    right     of those missing the ones that are prefetched; wrong: prefetched and not used
    together  reads that the missing ones take, of those that as many anywhere would
    known     which they are is known before the layer's tokens are mixed, and they are read then
    """

    layer: int
    residence: Residence
    way: str
    used: float
    seconds: float
    missing: float
    right: float = 0.0
    wrong: float = 0.0
    together: float = 1.0
    known: bool = False


class _Pass:
    """Goes the way of ``Model.forward`` with some tokens, on a Timeline.

    sample  number of a token whose missing experts are drawn; None: as many as on average
    """

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        profile: Profile,
        gap_bytes: int,
        block: int,
        tokens: int,
        sample: int | None,
    ) -> None:
        self.sample = sample
        self.bundle, self.plan, self.profile = bundle, plan, profile
        self.gap_bytes, self.block, self.tokens = gap_bytes, block, tokens
        self.layers = bundle.config.num_hidden_layers
        self.line = Timeline(profile)
        for part in ("attention", "feed-forward", *PARTS.values(), "the rest"):
            self.line.compute(part, 0.0)  # to be printed in this order
        self.read = dict.fromkeys(("neurons", *PARTS.values(), KEY_VALUES), 0.0)
        self.requests = 0.0
        self.matrices: dict[
            tuple[Role, int | None], list[TensorSpec]
        ] = {}  # {(role, layer): TensorSpecs}, layer None: of the whole model
        for spec in bundle.specs:
            if spec.role in PARTS and len(spec.shape) == 2:
                self.matrices.setdefault((spec.role, spec.layer), []).append(spec)
        self.units = [self._units(number) for number in range(self.layers)]
        self.kv_coming = deque(plan.kv_on_flash)  # layers whose keys and values are to be read
        self.kv_done = self._submit_kv()

    def multiply(self, role: Role, layer: int | None = None) -> None:
        """The products with the matrices of a role, streamed where they do not stay."""
        for spec in self.matrices.get((role, layer), ()):
            tensor = self.bundle.tensors[spec.name]
            kept = self.plan.rows_kept(spec, tensor) / tensor.rows
            self.line.multiply(PARTS[role], kept * self._linear(tensor) * self._rows_asked(spec))
            if kept < 1:
                self._stream(tensor, PARTS[role], PARTS[role], 1 - kept)

    def _rows_asked(self, spec: TensorSpec) -> float:
        """The share of a matrix's rows that a token needs: of a predictor those of the experts that
        were chosen."""
        router = None if spec.layer is None else self.bundle.config.layers[spec.layer].ffn.router
        if router is None or not spec.name.endswith("predictor.b"):
            return 1.0
        return router.experts_per_token / router.experts

    def _stream(self, tensor: StoredTensor, part: str, read: str, share: float = 1.0) -> None:
        """So much of a tensor, from flash."""
        nbytes, seconds = share * tensor.nbytes, share * self._linear(tensor)
        self.read[read] += nbytes
        self.line.stream(part, nbytes, self.plan.buffers / 2, seconds)

    def _linear(self, tensor: StoredTensor) -> float:
        return self.profile.linear_seconds(tensor, self.tokens)

    def mix(self, number: int) -> None:
        """A layer's mixer, with half of the context before the token."""
        self.multiply(ATTENTION, number)
        if number in self.plan.kv_on_flash:
            self.line.wait(self.kv_done, KEY_VALUES)
            self.kv_done = self._submit_kv()
        seen = self.tokens * self._seen_bytes(number)
        self.line.compute("attention", seen / self.profile.dram)

    def _seen_bytes(self, number: int) -> int:
        """Bytes of a layer's memory of its text that a token sees."""
        config = self.bundle.config.layers[number].mixer
        wanted = MemoryWanted(self.plan.context, self.plan.kv_dtype)
        return kind_of(config).seen_bytes(config, wanted)

    def _submit_kv(self) -> float:
        """Begin to read a layer's keys and values, of each text; when they are there."""
        if not self.kv_coming:
            return 0.0
        number = self.kv_coming.popleft()
        heads = self.bundle.config.layers[number].attention.num_key_value_heads
        texts = self.tokens if self.plan.texts > 1 else 1
        nbytes = texts * self._seen_bytes(number)
        self.read[KEY_VALUES] += nbytes
        return self.line.submit(max(2 * heads * texts, nbytes / PIECE_BYTES), nbytes)

    def read_known(self, number: int) -> tuple[float, float | None] | None:
        """Begin the reads of a layer whose units are known before its turn, but of those that were
        guessed, and then what is guessed for the next layer, unless that has to wait; when both
        are done, or None. None of any other layer."""
        units = self.units[number]
        if not units.known:
            return None
        late = units.missing - units.right
        return self._submit(units, late), None if late else self.prefetch(self.guess(number + 1))

    def guess(self, number: int) -> _Units | None:
        """Guess what a layer will use; its _Units, or None where nothing is prefetched for it."""
        units = self.units[number] if number < self.layers else None
        if units is None or units.right + units.wrong == 0:
            return None
        self._predict(number)
        self.line.compute("the rest", self.profile.cached / 2)
        return units

    def prefetch(self, units: _Units | None) -> float | None:
        """Begin the reads that a layer's guess asks for; when they are done, or None."""
        return None if units is None else self._submit(units, units.right + units.wrong)

    def _predict(self, number: int) -> None:
        if self.plan.mode == "predicted":
            self.multiply(PREDICTOR, number)

    def feed_forward(
        self, number: int, early: float | None, known: tuple[float, float | None] | None
    ) -> float | None:
        """A layer's FFN; early: when what was prefetched for it is done, or None; known: see
        ``read_known``. Returns when what is prefetched for the next layer is done."""
        line, units = self.line, self.units[number]
        self._predict(number)
        if units.way == CACHED:
            line.compute("the rest", self.profile.cached / (1 if early is None else 2))
            late = units.missing - units.right
            done, coming = known or (self._submit(units, late), None)
            guessed = None if coming is not None else self.guess(number + 1)
            after = self._compute(units, guessed, (early, units.right), (done, late))
            return after if coming is None else coming
        coming = self.prefetch(self.guess(number + 1))
        if units.way == WAVES:
            self._in_waves(units)
            return coming
        line.compute("the rest", self.profile.layer)
        if units.way == STREAMED and self.bundle.has_layout:
            self._in_tiles(units)
        elif units.way == STREAMED:
            self._stream(self.bundle.bundles(number), "feed-forward", "neurons")
        else:
            line.multiply("feed-forward", units.seconds)
        return coming

    def _compute(
        self, units: _Units, guessed: _Units | None, *reads: tuple[float | None, float]
    ) -> float | None:
        """Of the units that are there all but the down projection, while others come; of those,
        (when they are there, how many), the same when they are; at last the down projection.
        Also reads what is ``guessed``; returns when that is there, or None."""
        waits = guessed is not None and prefetch_waits(self.bundle.unit_bytes(guessed.layer))
        coming = None if waits else self.prefetch(guessed)
        parts = self.bundle.config.layers[units.layer].ffn.parts
        used = max(units.used, units.missing, 1e-9)
        before = units.seconds * (1 - 1 / parts) / used
        if self.tokens > 1:  # all come together: see UnitStore.arrivals
            reads = ((max(done or 0.0 for done, _ in reads), used),)
        else:
            self.line.multiply("feed-forward", before * (used - units.missing))
        for number, (done, n) in enumerate(reads, 1):
            self.line.wait(done or 0.0)
            if waits and number == len(reads):
                coming = self.prefetch(guessed)
            self.line.multiply("feed-forward", before * n)
        self.line.multiply("feed-forward", units.seconds / parts)
        return coming

    def _in_waves(self, units: _Units) -> None:
        layer = units.residence
        size, ahead = wave_size(
            layer.slots, layer.transit, layer.unit_neurons, self.plan.slot_bytes[units.layer]
        )
        waves = max(1, math.ceil(units.used / size))
        # A wave's lie close together, where neurons lie by their numbers.
        among = layer.units / (1 if self.bundle.has_layout else waves)
        coming: deque[float] = deque()
        for number in range(waves):
            self.line.compute("the rest", self.profile.cached / 2)  # nothing is prefetched
            if not coming:
                coming.append(self._submit(units, units.missing / waves, among))
            self.line.wait(coming.popleft())
            while len(coming) < min(ahead, waves - 1 - number):
                coming.append(self._submit(units, units.missing / waves, among))
            self.line.multiply("feed-forward", units.seconds / waves)

    def _in_tiles(self, units: _Units) -> None:
        """All of a layer whose neurons do not lie by their numbers, in which they are added."""
        every, number = units.residence.units, units.layer
        size = min(every, tile_rows(self.plan.buffers // 2, self.plan.slot_bytes[number]))
        seconds = self._linear(self.bundle.bundles(number))
        coming = self._submit(units, size)
        for first in range(0, every, size):
            n, after = min(size, every - first), min(size, every - first - size)
            there, coming = coming, self._submit(units, after) if after > 0 else 0.0
            self.line.wait(there, STREAMS)
            self.line.multiply("feed-forward", seconds * n / every)

    def _submit(self, units: _Units, missing: float, among: float | None = None) -> float:
        """Begin to read so many of a layer's units ``among`` these, or all; when they are there."""
        among = among or units.residence.units
        pieces = pieces_of_layer(self.bundle, units.layer, self.block)
        nbytes, requests = expected_reads(missing, among, pieces, self.gap_bytes)
        requests *= units.together
        self.read["neurons"] += nbytes
        self.requests += requests
        return self.line.submit(requests, nbytes)

    def _units(self, number: int) -> _Units:
        """The _Units of a layer."""
        bundle, plan, ffn = self.bundle, self.plan, self.bundle.config.layers[number].ffn
        residence, tensor = plan.residence(number, ffn), bundle.bundles(number)
        if not ffn.neurons:
            return _Units(number, residence, WHOLE, 0.0, 0.0, 0.0)
        chosen, slots = residence.chosen, plan.slots[number]
        record = bundle.record(number) if chosen else None
        one: float = (ffn.routed_units if chosen else 0) or ffn.units  # units of one token
        if record:
            one = ffn.units * record.predicted
        used = union(one, ffn.units, self.tokens, record)
        missing = used * (1 - slots / ffn.units)
        if record:
            missing = misses(record, plan, slots, ffn.units)
            if self.tokens > 1:  # what several tokens miss is read once
                missing = min(self.tokens * missing, used)
        way = way_to_run(residence, self.tokens, used, lambda: missing)
        named, draws = missing * plan.prefetch, Draws(number, self.sample)
        if way == CACHED:
            missing = draws.of(used, missing)
        share = self.tokens * one / max(used, 1e-9)
        seconds = used / ffn.units * self.profile.sparse_seconds(tensor, share)
        if way == WHOLE and not chosen:
            seconds = self._linear(tensor)
        units = _Units(number, residence, way, used, seconds, missing)
        if way == CACHED and record and record.reads is not None and bundle.has_layout:
            units.together = record.reads
        units.known = way == CACHED and reads_early(residence, self.tokens, used)
        in_dram = ffn.reads_experts or plan.predictor > 0
        guesses = number > 0 and self.tokens == 1 and way == CACHED
        guesses = guesses and may_prefetch(residence, in_dram, plan.prefetch)
        if guesses and prefetch_fits(used, ffn.routed_units, slots):
            right = _right(record, plan.prefetch)
            units.right = draws.of(missing, missing * plan.prefetch * right)
            units.wrong = draws.of(used, named * (1 - right))
        return units


def union(one: float, units: int, tokens: int, record: LayerCalibration | None) -> float:
    """Units of a layer that several tokens in a row use together, where one uses ``one``."""
    if tokens == 1:
        return one
    if record is None:  # each token's are drawn independently
        return units * (1 - (1 - one / units) ** tokens)
    rows = record.window_rows
    within, beyond = min(tokens, len(rows)), max(0, tokens - len(rows))
    more = rows[-1] - rows[-2]
    # What the last token added goes on shrinking, as fewer units are left that none has used.
    left = max(1e-9, units - rows[-1])
    return rows[within - 1] + left * (1 - (1 - min(1.0, more / left)) ** beyond)


def _right(calibrated: LayerCalibration | None, share: float) -> float:
    """How much of a guess is right, where its surest ``share`` counts."""
    right = GUESSED if calibrated is None or calibrated.guessed is None else calibrated.guessed
    if share == 1:
        return right
    if calibrated is None or calibrated.surest is None:
        return (1 + right) / 2
    return calibrated.surest


def misses(record: LayerCalibration, plan: Plan, slots: int, units: int) -> float:
    """Units of a layer to read per token, with ``slots`` of them in DRAM."""
    found = float(np.interp(slots / units, CAPACITIES, record.misses))
    if plan.window:  # not fewer than one token more of window would hold
        needs = record.window_rows
        at = min(plan.window, WINDOWS - 1)
        found = max(found, needs[at] - needs[at - 1])
    return min(found, float(units))
