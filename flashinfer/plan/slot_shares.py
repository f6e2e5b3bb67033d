"""How the memory of the neuron caches is shared among the layers, by what calibration found."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flashinfer.formats.bundle.calibration import CAPACITIES, WINDOWS, LayerCalibration
from flashinfer.formats.bundle.reader import Bundle


class Curve(NamedTuple):
    """Of a layer's record the curve alone: misses a token with caches of CAPACITIES."""

    misses: tuple[float, ...]


@dataclass(frozen=True)
class CachedLayer:
    """A layer whose units a predictor or a router chooses.

    units       of the layer; slot_bytes: of a slot of its neuron cache
    needs       (k,): the most units that windows of 1, 2, ... k tokens use
    least       slots that it gets, whatever the memory
    record      what calibration found of it, or its curve alone, or None
    """

    units: int
    slot_bytes: int
    needs: tuple[int, ...]
    least: int
    record: LayerCalibration | Curve | None

    def slots_for(self, window: int) -> int:
        """Slots for a window of k tokens: the most that it needed when calibrated and a tenth more;
        beyond the windows calibrated, by what the last token added."""
        needs = self.needs
        slope = needs[-1] - needs[-2] if len(needs) > 1 else needs[-1]
        beyond = max(0, window - len(needs)) * slope
        return min(self.units, math.ceil(1.1 * (needs[min(window, len(needs)) - 1] + beyond)))


def cached_layer(bundle: Bundle, layer: int, slot_bytes: int, least: int) -> CachedLayer:
    """The CachedLayer of a bundle's layer."""
    ffn, record = bundle.config.layers[layer].ffn, bundle.record(layer)
    needs = [ffn.units]
    if record is not None:
        needs = [min(ffn.units, max(1, int(n))) for n in record.window_rows_most]
    elif ffn.routed_units:
        needs = [min(ffn.units, k * ffn.routed_units) for k in range(1, WINDOWS + 1)]
    return CachedLayer(ffn.units, slot_bytes, tuple(needs), min(least, ffn.units), record)


def nbytes(layers: Sequence[CachedLayer], slots: Sequence[int]) -> int:
    """Bytes of so many slots of each layer."""
    return sum(n * layer.slot_bytes for layer, n in zip(layers, slots, strict=True))


class Shares(NamedTuple):
    """What layers get."""

    slots: list[int]  # of each
    window: int | None  # that was asked for, or fits; None: none
    affords: int | None  # the largest calibrated window that the slots hold; None: unknown


def share_slots(
    layers: Sequence[CachedLayer],
    room: int,
    policy: str,
    window: int | None,
    passing: bool = False,
) -> Shares:
    """Share ``room`` bytes among layers.

    passing  a layer may have less than one token uses, or none but its least
    """
    if not layers:
        return Shares([], None, None)
    windows = range(1, max(len(layer.needs) for layer in layers) + 1)
    if policy == "window" and window is None:
        fitting = (k for k in windows if nbytes(layers, _for_window(layers, k)) <= room)
        window = max(fitting, default=1)
    every = [layer.units for layer in layers]
    if window is None and nbytes(layers, every) <= room:
        return Shares(every, None, None)
    if window is not None:
        shape = _for_window(layers, window)
        slots = _in_proportion(layers, shape, min(room, nbytes(layers, shape)))
    elif all(layer.record is None for layer in layers):
        slots = _evenly(layers, room)
    else:
        slots = fewest_misses(layers, room, passing)
    holds = [
        k
        for k in windows
        if all(
            n >= layer.needs[min(k, len(layer.needs)) - 1]
            for n, layer in zip(slots, layers, strict=True)
        )
    ]
    return Shares(slots, window, max(holds, default=None))


def _for_window(layers: Sequence[CachedLayer], window: int) -> list[int]:
    return [layer.slots_for(window) for layer in layers]


def fewest_misses(layers: Sequence[CachedLayer], room: int, passing: bool = False) -> list[int]:
    """The split of ``room`` bytes for which the layers' miss curves promise the fewest reads.

    Unless units are ``passing`` (through few slots, wave by wave), every layer first gets what one
    token needs, as far as it goes.
    """
    shape = [0 if passing else n for n in _for_window(layers, 1)]
    slots = _in_proportion(layers, shape, min(room, nbytes(layers, shape)))
    left = room - nbytes(layers, slots)
    pieces = []  # (bytes of reads saved per byte of slots, layer, slots)
    for number, layer in enumerate(layers):
        if layer.record is None:
            continue
        points = [
            (c * layer.units, m) for c, m in zip(CAPACITIES, layer.record.misses, strict=True)
        ]
        held, curve = zip(*points, strict=True)
        begin = slots[number], float(np.interp(slots[number], held, curve))
        hull = _lower_hull([begin] + [p for p in points if p[0] > begin[0]])
        for (r0, m0), (r1, m1) in itertools.pairwise(hull):
            pieces.append(((m0 - m1) / (r1 - r0), number, int(r1) - int(r0)))
    # A hull is convex, so that a layer's pieces come in their own order.
    for _, number, size in sorted(pieces, key=lambda piece: -piece[0]):
        size = min(size, left // layers[number].slot_bytes)
        slots[number] += size
        left -= size * layers[number].slot_bytes
    return slots


def _lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of the convex curve below these; their first co-ordinates rise."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _evenly(layers: Sequence[CachedLayer], room: int) -> list[int]:
    """As many slots for each layer, and what is left for the first ones."""
    slots = _in_proportion(layers, [1] * len(layers), room)
    left = room - nbytes(layers, slots)
    for number, layer in enumerate(layers):
        if slots[number] < layer.units and layer.slot_bytes <= left:
            slots[number] += 1
            left -= layer.slot_bytes
    return slots


def _in_proportion(layers: Sequence[CachedLayer], shape: Sequence[int], room: int) -> list[int]:
    """Slots in proportion to ``shape``, each layer's at least its least and at most its units, in
    all at most ``room`` bytes."""

    def scaled(scale: float) -> list[int]:
        return [
            max(layer.least, min(layer.units, int(scale * n)))
            for layer, n in zip(layers, shape, strict=True)
        ]

    low, high = 0.0, max(layer.units for layer in layers) / max(1, min(shape))
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (scale, high) if nbytes(layers, scaled(scale)) <= room else (low, scale)
    return scaled(low)
