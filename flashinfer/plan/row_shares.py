"""How a plan's rows of neuron caches are shared among the layers, by what calibration found."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from flashinfer.formats.bundle.calibration import CAPACITIES, WINDOWS, LayerCalibration
from flashinfer.formats.bundle.reader import Bundle


def share_rows(
    bundle: Bundle, neurons: str, room: int, policy: str, window: int | None, least_rows: int
) -> tuple[tuple[int, ...], int | None, int | None]:
    """Share ``room`` rows among the layers; return (rows of each, window, the window they hold)."""
    layers, units = bundle.config.num_hidden_layers, bundle.config.units
    if neurons == "dense":  # whole layers, as many as fit
        whole = min(layers, room // units)
        return (units,) * whole + (0,) * (layers - whole), None, None
    needs = window_needs(bundle)  # [layer][k - 1]: the most rows that k tokens used
    if policy == "window" and window is None:
        windows = range(1, len(needs[0]) + 1)
        fitting = (k for k in windows if sum(rows_for(n, k, units) for n in needs) <= room)
        window = max(fitting, default=1)
    if window is None and room >= layers * units:
        return (units,) * layers, None, None
    if window is not None:
        shape = [rows_for(need, window, units) for need in needs]
        rows = _in_proportion(shape, min(room, sum(shape)), least_rows, units)
    elif bundle.calibration is None:
        rows = _in_proportion([1] * layers, room, least_rows, units)
    else:
        rows = fewest_misses(bundle.calibration.recorded, room, least_rows, units)
    holds = [
        k
        for k in range(1, len(needs[0]) + 1)
        if all(r >= need[k - 1] for r, need in zip(rows, needs, strict=True))
    ]
    return rows, window, max(holds, default=None)


def fewest_misses(
    calibrated: Sequence[LayerCalibration], room: int, least: int, most: int
) -> tuple[int, ...]:
    """The split of ``room`` rows for which the layers' miss curves promise the fewest reads.

    First every layer gets what a single token needs, as far as it goes.
    """
    shape = [rows_for(layer.window_rows_most, 1, most) for layer in calibrated]
    rows = list(_in_proportion(shape, min(room, sum(shape)), least, most))
    left = room - sum(rows)
    pieces = []  # (reads saved per row, layer, rows)
    for number, layer in enumerate(calibrated):
        points = [(c * most, m) for c, m in zip(CAPACITIES, layer.misses, strict=True)]
        held, curve = zip(*points, strict=True)
        begin = rows[number], float(np.interp(rows[number], held, curve))
        hull = _lower_hull([begin] + [p for p in points if p[0] > begin[0]])
        for (r0, m0), (r1, m1) in itertools.pairwise(hull):
            pieces.append(((m0 - m1) / (r1 - r0), number, int(r1) - int(r0)))
    # A hull is convex, so that a layer's pieces come in their own order.
    for _, number, size in sorted(pieces, key=lambda piece: -piece[0]):
        size = min(size, left)
        rows[number] += size
        left -= size
    return tuple(rows)


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


def window_needs(bundle: Bundle) -> list[list[int]]:
    """Per layer, the most rows that 1, 2, ... tokens used when calibrated, or may use."""
    config, units = bundle.config, bundle.config.units
    if bundle.calibration is None:
        known = [min(units, k * config.experts_per_token) for k in range(1, WINDOWS + 1)]
        return [known if config.experts else [units]] * config.num_hidden_layers
    return [
        [min(units, max(1, int(n))) for n in layer.window_rows_most]
        for layer in bundle.calibration.recorded
    ]


def rows_for(need: Sequence[float], window: int, units: int) -> int:
    """Rows for a window of k tokens: the most that it needed when calibrated and a tenth more;
    beyond the windows calibrated, by what the last token added."""
    slope = need[-1] - need[-2] if len(need) > 1 else need[-1]
    beyond = max(0, window - len(need)) * slope
    return min(units, math.ceil(1.1 * (need[min(window, len(need)) - 1] + beyond)))


def _in_proportion(shape: list[int], room: int, least: int, most: int) -> tuple[int, ...]:
    """Rows in proportion to ``shape``, each at least ``least`` and at most ``most``, in all
    at most ``room``."""
    low, high = 0.0, most / max(1, min(shape))
    for _ in range(60):
        scale = (low + high) / 2
        rows = [max(least, min(most, int(scale * s))) for s in shape]
        low, high = (scale, high) if sum(rows) <= room else (low, scale)
    return tuple(max(least, min(most, int(low * s))) for s in shape)
