"""What a token will cost: bytes and seconds by part, from a plan and a device's profile."""

import math
from dataclasses import dataclass

import numpy as np

from flashinfer.formats.bundle.calibration import CAPACITIES, WINDOWS, LayerCalibration
from flashinfer.formats.bundle.layout import ATTENTION, HEAD, PREDICTOR, TensorSpec
from flashinfer.formats.bundle.reader import Bundle, StoredTensor
from flashinfer.paper.ways import (
    CACHED,
    STREAMED,
    WAVES,
    WHOLE,
    may_prefetch,
    prefetch_fits,
    wave_size,
    way_to_run,
)  # fmt: skip
from flashinfer.plan.expected_reads import expected_reads
from flashinfer.plan.plan import Plan, kv_dtype
from flashinfer.plan.profile import Profile
from flashinfer.plan.timeline import Timeline
from flashinfer.transformer.kv_cache import attention_window, kv_bytes

PARTS = {ATTENTION: "attention", PREDICTOR: "predictors", HEAD: "output head"}
GUESSED = 0.8  # of what a layer uses is guessed one layer early, where calibration does not say


@dataclass(frozen=True)
class Cost:
    """Of one token.

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


def predict(bundle: Bundle, plan: Plan, profile: Profile, gap_bytes: int, block: int = 512) -> Cost:
    """The Cost of a token in the middle of the context.

    gap_bytes  neurons no further apart are read as one; block: bytes that reads are aligned to
    """
    token = _Token(bundle, plan, profile, gap_bytes, block)
    ahead = None
    for number in range(bundle.config.num_hidden_layers):
        token.attention(number)
        ahead = token.feed_forward(number, ahead)
    token.multiply(HEAD)
    return Cost(token.read, token.requests, dict(token.line.seconds))


@dataclass
class _Units:
    """What a layer's FFN does for a token, the ``way`` that it runs (see ways.py): units used, of
    them missing; of those prefetched, and beside them wrong ones; seconds of computing."""

    used: float
    slots: int
    way: str
    seconds: float
    missing: float = 0.0
    ahead: float = 0.0
    wrong: float = 0.0


class _Token:
    """Goes the way of ``Model.forward``, on a Timeline."""

    def __init__(
        self, bundle: Bundle, plan: Plan, profile: Profile, gap_bytes: int, block: int
    ) -> None:
        self.bundle, self.plan, self.profile = bundle, plan, profile
        self.gap_bytes, self.block = gap_bytes, block
        self.layers = bundle.config.num_hidden_layers
        self.line = Timeline(profile)
        for part in ("attention", "feed-forward", *PARTS.values(), "the rest"):
            self.line.compute(part, 0.0)  # to be printed in this order
        self.read = dict.fromkeys(("neurons", *PARTS.values()), 0.0)
        self.requests = 0.0
        self.matrices: dict[
            tuple[str, int | None], list[TensorSpec]
        ] = {}  # {(role, layer): TensorSpecs}, layer None: of the whole model
        for spec in bundle.specs:
            if spec.role in PARTS and len(spec.shape) == 2:
                layer = None if spec.role == HEAD else int(spec.name.split(".")[1])
                self.matrices.setdefault((spec.role, layer), []).append(spec)
        self.units = [self._units(number) for number in range(self.layers)]

    def _bundles(self, number: int) -> StoredTensor:
        return self.bundle.tensors[f"layers.{number}.ffn.bundles"]

    def multiply(self, role: str, layer: int | None = None) -> None:
        """The products with the matrices of a role, streamed where they do not stay."""
        for spec in self.matrices.get((role, layer), ()):
            tensor = self.bundle.tensors[spec.name]
            kept = self.plan.rows_kept(spec, tensor) / tensor.rows
            self.line.multiply(PARTS[role], kept * self._linear(tensor) * self._share(spec))
            if kept < 1:
                self._stream(tensor, PARTS[role], PARTS[role], 1 - kept)

    def _share(self, spec: TensorSpec) -> float:
        """Of a predictor only the rows for the experts that were chosen."""
        config = self.bundle.config
        some = config.neurons_apart and spec.name.endswith("predictor.b")
        return config.experts_per_token / config.experts if some else 1.0

    def _stream(self, tensor: StoredTensor, part: str, read: str, share: float = 1.0) -> None:
        """So much of a tensor, from flash."""
        nbytes, seconds = share * tensor.nbytes, share * self._linear(tensor)
        self.read[read] += nbytes
        self.line.stream(part, nbytes, self.plan.buffers / 2, seconds)

    def _linear(self, tensor: StoredTensor) -> float:
        return tensor.nbytes / self.profile.linear[tensor.format.name]

    def attention(self, number: int) -> None:
        """With half of the context's keys and values."""
        self.multiply(ATTENTION, number)
        config, seen = self.bundle.config, self.plan.context // 2
        seen = min(seen, attention_window(config, number) or seen)
        cached = 2 * kv_bytes(config, seen, kv_dtype(self.bundle).itemsize)
        self.line.compute("attention", cached / self.profile.dram)

    def prefetch(self, number: int) -> float | None:
        """Begin the reads that a layer's guess asks for; when they are done, or None."""
        units = self.units[number] if number < self.layers else None
        if units is None or units.ahead == 0:
            return None
        self._predict(number)
        self.line.compute("the rest", self.profile.cached / 2)
        return self._submit(units.ahead + units.wrong)

    def _predict(self, number: int) -> None:
        if self.plan.neurons == "predicted":
            self.multiply(PREDICTOR, number)

    def feed_forward(self, number: int, ahead: float | None) -> float | None:
        """A layer's FFN; ahead: when what was prefetched for it is done, or None. Returns that
        of the next layer."""
        line, units = self.line, self.units[number]
        self._predict(number)
        if units.way == CACHED:
            line.compute("the rest", self.profile.cached / (1 if ahead is None else 2))
            late = units.missing - units.ahead
            done = self._submit(late)
            coming = self.prefetch(number + 1)
            self._compute(units, (ahead, units.ahead), (done, late))
            return coming
        coming = self.prefetch(number + 1)
        if units.way == WAVES:
            self._in_waves(units)
            return coming
        line.compute("the rest", self.profile.layer)
        if units.way == STREAMED:
            self._stream(self._bundles(number), "feed-forward", "neurons")
        else:
            line.multiply("feed-forward", units.seconds)
        return coming

    def _compute(self, units: _Units, *reads: tuple[float | None, float]) -> None:
        """Of the units that are there all but the down projection, while others come; of those,
        (when they are there, how many), the same when they are; at last the down projection."""
        parts, used = self.bundle.config.parts, max(units.used, units.missing, 1e-9)
        before = units.seconds * (1 - 1 / parts) / used
        self.line.multiply("feed-forward", before * (used - units.missing))
        for done, n in reads:
            self.line.wait(done or 0.0)
            self.line.multiply("feed-forward", before * n)
        self.line.multiply("feed-forward", units.seconds / parts)

    def _in_waves(self, units: _Units) -> None:
        size, overlap = wave_size(
            units.slots, self.bundle.config.unit_neurons, self.bundle.unit_bytes
        )
        waves = max(1, math.ceil(units.used / size))
        among = self.bundle.config.units / waves  # a wave's lie close together
        coming = None
        for number in range(waves):
            self.line.compute("the rest", self.profile.cached / 2)  # nothing is prefetched
            done = self._submit(units.missing / waves, among) if coming is None else coming
            coming = None
            if overlap and number + 1 < waves:
                coming = self._submit(units.missing / waves, among)
            self.line.wait(done)
            self.line.multiply("feed-forward", units.seconds / waves)

    def _submit(self, missing: float, among: float | None = None) -> float:
        """Begin to read so many units ``among`` these, or a layer's; when they are there."""
        among = among or self.bundle.config.units
        nbytes, requests = expected_reads(
            missing, among, self.bundle.unit_bytes, self.gap_bytes, self.block
        )
        self.read["neurons"] += nbytes
        self.requests += requests
        return self.line.submit(requests, nbytes)

    def _units(self, number: int) -> _Units:
        """The _Units of a layer."""
        bundle, plan, config = self.bundle, self.plan, self.bundle.config
        rows, tensor = plan.cache_rows[number], self._bundles(number)
        chosen = plan.neurons != "dense"
        calibrated = bundle.record(number) if chosen else None
        used = (config.experts_per_token if chosen else 0) or config.units
        if calibrated:
            used = config.units * calibrated.predicted
        missing = used * (1 - rows / config.units)
        if calibrated:
            missing = misses(calibrated, plan, rows, config.units)
        way = way_to_run(
            whole=rows == config.units and plan.window is None, chosen=chosen, units=config.units,
            slots=rows or plan.shared_rows, unit_neurons=config.unit_neurons, tokens=1, used=used,
            missing=lambda: missing,
        )  # fmt: skip
        seconds = used * bundle.unit_bytes / self.profile.sparse[tensor.format.name]
        if way == WHOLE and not chosen:
            seconds = self._linear(tensor)
        units = _Units(used, rows or plan.shared_rows, way, seconds, missing)
        guesses = number > 0 and way == CACHED and may_prefetch(
            whole=False, chosen=chosen, borrowed=rows == 0,
            in_dram=config.reads_experts or plan.predictor > 0, share=plan.ahead,
        )  # fmt: skip
        if guesses and prefetch_fits(used, config.experts_per_token, rows):
            named, right = missing * plan.ahead, _right(calibrated, plan.ahead)
            units.ahead, units.wrong = named * right, named * (1 - right)
        return units


def _right(calibrated: LayerCalibration | None, share: float) -> float:
    """How much of a guess is right, where its surest ``share`` counts."""
    right = GUESSED if calibrated is None or calibrated.guessed is None else calibrated.guessed
    if share == 1:
        return right
    if calibrated is None or calibrated.surest is None:
        return (1 + right) / 2
    return calibrated.surest


def misses(calibrated: LayerCalibration, plan: Plan, rows: int, neurons: int) -> float:
    """Neurons of a layer to read per token, with ``rows`` of them in DRAM."""
    if plan.window:  # those that a window of one token more would hold, and this one does not
        needs = calibrated.window_rows
        at = min(plan.window, WINDOWS - 1)
        return needs[at] - needs[at - 1]
    return float(np.interp(rows / neurons, CAPACITIES, calibrated.misses))
