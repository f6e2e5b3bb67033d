"""Ideas that do not pay, with what they would bring on this model and machine."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flashinfer.calibration.traces import miss_curve
from flashinfer.formats.arrays import AnyArray, Float32Array, UInt8Array
from flashinfer.formats.bundle.calibration import LayerCalibration
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError
from flashinfer.formats.number_formats import FORMATS
from flashinfer.paper.interfaces import Chooser
from flashinfer.paper.neuron_cache import NeuronCache
from flashinfer.paper.selection import Selection
from flashinfer.paper.waves import in_waves
from flashinfer.plan.slot_shares import CachedLayer, Curve, fewest_misses
from flashinfer.study.activity import SEQUENCE, Study
from flashinfer.study.expected import expected
from flashinfer.study.findings import Cell, Chart, Finding, Table

VALUES = 1 << 22  # weights of a layer, or fewer, whose entropy is taken
TOKENS = 1024  # whose uses the caches follow
SHARE = 2  # the caches hold one in so many units
LEAST = 32  # slots of a layer
Record = LayerCalibration | None


def run(study: Study) -> Finding:
    """The Finding of the study's first text."""
    with study.bundle() as bundle:
        bits = entropies(bundle)
        half = bundle.nbytes // 2
        records = [bundle.record(i) for i in range(len(bundle.config.layers))]
        spinning = replace(study.profile, wake=0.0)
        asleep = expected(study, bundle, half).total
        awake = expected(study, bundle, half, spinning).total
        units = [layer.ffn.units for layer in bundle.config.layers]
    fixed, pooled = caches(chosen(study), units, records)
    rows: list[list[Cell]] = [
        ["entropy coding of weights", "bits of a weight in f16", 16.0, bits["f16"]],
        ["entropy coding of weights", "bits of a weight in q4_0", 4.5, bits["q4_0"]],
        ["threads that spin while they wait", "expected milliseconds a token", 1e3 * asleep,
         1e3 * awake],
        ["slots that layers lend each other", "units read a token", fixed, pooled],
    ]  # fmt: skip
    for row in rows:
        row.append(float(row[2] or 0) / float(row[3] or 1))
    labels = ["entropy, f16", "entropy, q4_0", "spinning", "one pool"]
    return Finding(
        "failed",
        "Ideas that do not pay",
        "What would be gained by ideas that the engine does without?",
        "Beyond the paper.",
        [
            f"The feed-forward weights hold {bits['f16']:.1f} bits of information each where f16 "
            f"takes 16, and {bits['q4_0']:.1f} where q4_0 takes 4.5: a perfect entropy coder would "
            f"read {16 / bits['f16']:.2f} and {4.5 / bits['q4_0']:.2f} times fewer bytes, and all "
            "of them would have to be decoded before they are multiplied.",
            f"Threads that never sleep while reads are awaited would save "
            f"{100 * (asleep - awake) / asleep:.1f} % of a token's expected time at half memory, "
            "for a core that is always busy.",
            f"One pool of slots for all layers, in which what is worth the least leaves whatever "
            f"its layer, reads {pooled:.3g} units a token where each layer's own slots, shared out "
            f"beforehand by the miss curves, read {fixed:.3g}: {_times(fixed, pooled)}. All slots "
            "would have to be of one size, and a layer could push out what the next one needs.",
        ],
        [Table("What these ideas would bring at the most",
               ["idea", "figure", "as it is", "with it", "times fewer"], rows)],
        [Chart("What these ideas would bring at the most", "idea", "times fewer",
               {"gain": [(float(i), float(row[4] or 0)) for i, row in enumerate(rows)]},
               kind="bars", labels=labels)],
    )  # fmt: skip


def _times(fixed: float, pooled: float) -> str:
    if not pooled or fixed <= pooled:
        return "it reads no fewer"
    return f"{fixed / pooled:.2f} times fewer"


def entropies(bundle: Bundle) -> dict[str, float]:
    """{number format: bits of information in a weight of the first layer's neurons}, scales and
    headers of blocks not coded but counted."""
    stored = bundle.bundles(0)
    rows = max(1, min(stored.rows, VALUES // stored.columns))
    raw = bundle.file.read_bytes(stored.offset, rows * stored.row_bytes)
    values = stored.format.decode(np.frombuffer(raw, np.uint8).reshape(rows, stored.row_bytes))
    half = values.astype(np.float16).view(np.uint16)
    coded: UInt8Array = FORMATS["q4_0"].encode(values.reshape(-1, 32))  # (blocks, 18)
    nibbles = np.stack([coded[:, 2:] & 15, coded[:, 2:] >> 4])
    return {"f16": entropy(half), "q4_0": entropy(nibbles) + 16 / 32}


def entropy(symbols: AnyArray) -> float:
    """Bits of information in a symbol, whatever stands around it."""
    counts = np.bincount(symbols.ravel())
    shares = counts[counts > 0] / symbols.size
    return float(-(shares * np.log2(shares)).sum())


class Chosen:
    """A layer's predictor or router, which notes what it chooses: a Selection a token."""

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser
        self.trace: list[Selection] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.chooser, name)

    def select(self, x: Float32Array, residual: Float32Array | None) -> Selection:
        """As the chooser's."""
        selection = self.chooser.select(x, residual)
        for token in range(len(x)):
            units = selection.between(token, token + 1).units
            self.trace.append(Selection(units, None, None, np.zeros(len(units), dtype=np.int32)))
        return selection


def chosen(study: Study) -> list[list[Selection]]:
    """[layer][token]: what is chosen along the study's first text. Raises UserError where nothing
    chooses."""
    ids, sequence = study.samples[0].ids[:TOKENS], SEQUENCE
    with study.open(context=min(sequence, len(ids)), draft="off") as model:
        choosers = []
        for layer in model.layers:
            if layer.feed_forward.predictor is None:
                raise UserError(
                    f"{study.path}: nothing chooses the units of its layers; flashinfer calibrate "
                    "makes predictors"
                )
            choosers.append(Chosen(layer.feed_forward.predictor))
            layer.feed_forward.predictor = choosers[-1]
        for first in range(0, len(ids), sequence):
            study.progress("failed", first, len(ids))
            model.reset()
            model.forward(ids[first : first + sequence])
        study.progress("failed", len(ids), len(ids))
        return [chooser.trace for chooser in choosers]


def caches(
    traces: Sequence[Sequence[Selection]], units: Sequence[int], records: Sequence[Record]
) -> tuple[float, float]:
    """Units read a token in the second half of the text: with slots of each layer's own, shared out
    by the miss curves; and with one pool of as many slots."""
    tokens = len(traces[0])
    capacity = max(sum(units) // SHARE, LEAST * len(units))
    shared = fewest_misses(
        [CachedLayer(n, 1, (0,), min(n, LEAST),
                     record or Curve(miss_curve(trace[: tokens // 2], n)))
         for trace, n, record in zip(traces, units, records, strict=True)],
        capacity, passing=True,
    )  # fmt: skip
    own = [NeuronCache(n, np.zeros(slots, np.uint8), 1, "frecency")
           for n, slots in zip(units, shared, strict=True)]  # fmt: skip
    pool = NeuronCache(sum(units), np.zeros(capacity, np.uint8), 1, "frecency")
    begins = np.cumsum([0, *units], dtype=np.int32)
    fixed = pooled = 0
    for token in range(tokens):
        if token == tokens // 2:
            fixed, pooled = sum(cache.misses for cache in own), pool.misses
        for trace, cache, begin in zip(traces, own, begins, strict=False):
            _use(cache, trace[token], token)
            _use(pool, replaced(trace[token], begin), token)
    half = tokens - tokens // 2
    return (sum(c.misses for c in own) - fixed) / half, (pool.misses - pooled) / half


def replaced(selection: Selection, begin: np.int32) -> Selection:
    """The same units, numbered from ``begin`` on."""
    return Selection(selection.units + begin, None, None, selection.last)


def _use(cache: NeuronCache, selection: Selection, token: int) -> None:
    """A token uses units, which come in waves where they do not all fit."""
    cache.priority.note(selection, token)
    if len(selection.units) <= cache.capacity:
        cache.place(selection.units, token)
        return
    for _ in in_waves(cache, selection.units, token, 1, lambda units, slots: None):
        pass
