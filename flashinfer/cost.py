"""What a token will cost: bytes and seconds by part, from a plan and a device's profile."""

import math
from dataclasses import dataclass

import numpy as np

from flashinfer.flash import PIECE_BYTES
from flashinfer.formats.bundle import CAPACITIES, WINDOWS
from flashinfer.formats.layout import ATTENTION, HEAD, PREDICTOR


@dataclass(frozen=True)
class Cost:
    """Of one token.

    read      {part: bytes from flash}; requests: reads of neurons
    seconds   {part: seconds} of computing, by itself
    reading   seconds of reading neurons; streaming: of the large reads, with what computes on them
    total     seconds: while neurons are read ahead the rest is computed, as far as it goes
    """

    read: dict
    requests: float
    seconds: dict
    reading: float
    streaming: float
    total: float

    @property
    def bytes(self):
        return sum(self.read.values())

    @property
    def tokens_per_second(self):
        return 1 / self.total


def predict(bundle, plan, profile, gap_bytes, block=512):
    """The Cost of a token in the middle of the context.

    gap_bytes  neurons no further apart are read as one; block: bytes that reads are aligned to
    """
    layers = bundle.config.num_hidden_layers
    seconds = {"attention": 0.0, "feed-forward": 0.0, "predictors": 0.0, "output head": 0.0}
    parts = {ATTENTION: "attention", PREDICTOR: "predictors", HEAD: "output head"}
    read, streaming = {"neurons": 0.0, **dict.fromkeys(parts.values(), 0.0)}, 0.0
    for spec in bundle.specs:
        tensor = bundle.tensors[spec.name]
        if spec.role not in parts or len(spec.shape) == 1:
            continue
        if spec.role == PREDICTOR and plan.neurons == "dense":
            continue
        part, compute = parts[spec.role], tensor.nbytes / profile.linear[tensor.format.name]
        if not plan.stays(spec):
            read[part] += tensor.nbytes
            streaming += _stream_seconds(tensor.nbytes, compute, plan, profile)
        else:
            seconds[part] += compute
    seconds["attention"] += plan.kv_cache / 2 / profile.dram
    requests = reading = 0.0
    for number, rows in enumerate(plan.cache_rows):
        layer = _feed_forward(bundle, plan, profile, number, rows, gap_bytes, block)
        read["neurons"] += layer.read
        requests += layer.requests
        seconds["feed-forward"] += layer.seconds
        reading += layer.reading
        streaming += layer.streaming
    whole = sum(_stays_whole(plan, rows, bundle.config.units) for rows in plan.cache_rows)
    cached = layers - whole if plan.neurons != "dense" else 0
    seconds["the rest"] = (layers - cached) * profile.layer + cached * profile.cached
    seconds["submitting reads"] = requests * profile.submit
    # Reads and computing overlap, but not wholly: the first layer has no reads ahead, the head none
    # at all, and small batches do not fill the flash's queue. The longer one rules; where they are
    # alike, a half more. (bench.end_to_end holds this against measurements.)
    total = streaming + math.hypot(reading, sum(seconds.values()))
    return Cost(read, requests, seconds, reading, streaming, total)


def _stays_whole(plan, rows, neurons):
    return rows == neurons and plan.window is None


@dataclass
class _Layer:
    read: float = 0.0
    requests: float = 0.0
    seconds: float = 0.0
    reading: float = 0.0
    streaming: float = 0.0


def _feed_forward(bundle, plan, profile, number, rows, gap_bytes, block):
    tensor = bundle.tensors[f"layers.{number}.ffn.bundles"]
    if plan.neurons == "dense":
        compute = tensor.nbytes / profile.linear[tensor.format.name]
        if _stays_whole(plan, rows, tensor.rows):
            return _Layer(seconds=compute)
        time = _stream_seconds(tensor.nbytes, compute, plan, profile)
        return _Layer(read=tensor.nbytes, streaming=time)
    calibrated = bundle.calibration["layers"][number] if bundle.calibration else None
    units, unit_bytes = bundle.config.units, bundle.unit_bytes
    used = bundle.config.experts_per_token or units
    if calibrated:
        used = units * calibrated["predicted"]
    # Rows far apart, or an expert's, which follow each other.
    speed = profile.linear if bundle.config.experts else profile.sparse
    seconds = used * unit_bytes / speed[tensor.format.name]
    missing = misses(calibrated, plan, rows, units) if calibrated else used * (1 - rows / units)
    if _stays_whole(plan, rows, units):
        missing = 0.0
    nbytes, requests = merged(missing, units, unit_bytes, gap_bytes, block)
    requests *= math.ceil(unit_bytes / PIECE_BYTES)  # all of them in flight
    reading = requests * profile.read_seconds(nbytes / requests) if requests else 0.0
    if rows < used:  # it comes in waves, each read and then used
        waves = math.ceil(used / max(1, rows))
        waiting = waves * (profile.latency + profile.cached)
        return _Layer(nbytes, requests, streaming=reading + seconds + waiting)
    return _Layer(nbytes, requests, seconds, reading)


def _stream_seconds(nbytes, compute, plan, profile):
    """Of a tensor in tiles of half the buffer: one is read while the one before is used."""
    tiles = math.ceil(nbytes / (plan.buffers / 2))
    return max(compute, nbytes / profile.sequential + tiles * profile.latency)


def misses(calibrated, plan, rows, neurons):
    """Neurons of a layer to read per token, with ``rows`` of them in DRAM."""
    if plan.window:  # those that a window of one token more would hold, and this one does not
        needs = calibrated["window_rows"]
        at = min(plan.window, WINDOWS - 1)
        return needs[at] - needs[at - 1]
    return float(np.interp(rows / neurons, CAPACITIES, calibrated["misses"]))


def merged(missing, neurons, row_bytes, gap_bytes, block):
    """(bytes, requests) for rows that are missing at random, neighbours read as one."""
    if missing <= 0:
        return 0.0, 0.0
    skip = int(np.gcd(row_bytes, block))
    widened = row_bytes + block - skip if row_bytes % block else row_bytes
    density = min(1.0, missing / neurons)
    reach = 1 + gap_bytes // row_bytes  # the next row, and those that a gap skips
    close = 1 - (1 - density) ** reach  # the chance that a row is joined to the one before
    distances = np.arange(reach)
    chances = density * (1 - density) ** distances
    gap = float((chances * distances).sum()) * row_bytes
    nbytes = missing * (widened - close * (widened - row_bytes) + gap)
    return nbytes, missing * (1 - close)
