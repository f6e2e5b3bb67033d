"""Chapter 7: a plan for the memory."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flashinfer.course.engine import opened, run, text
from flashinfer.course.lesson import Answer, Grade, in_place_of, shown
from flashinfer.formats.arrays import Float64Array
from flashinfer.formats.bundle.calibration import CAPACITIES
from flashinfer.plan import slot_shares
from flashinfer.plan.slot_shares import CachedLayer, fewest_misses

TITLE = "a plan for the memory"
ENGINE = "flashinfer/plan/slot_shares.py: fewest_misses"
MORE = 1.02  # times as many reads as with the engine's own plan, or fewer


class Curve(NamedTuple):
    """Of a layer, what a cache misses by its size.

    slots       (k,) ascending, from 0 on: sizes
    misses      (k,) falling: neurons that a cache of so many slots misses a token
    slot_bytes  of a slot
    least       slots that the layer gets in any case
    """

    slots: Float64Array
    misses: Float64Array
    slot_bytes: int
    least: int


def divide(curves: Sequence[Curve], room: int) -> list[int]:
    """Share memory among the caches of the layers, so that a token reads as little as possible.

    curves  of each layer: ``slots`` and ``misses``, two arrays, say how many neurons a token
            misses with a cache of so many slots (between two sizes: on the straight line);
            ``slot_bytes``: bytes of a slot; ``least``: slots that it gets in any case. No layer can
            use more than the last of its ``slots``
    room    bytes for all caches together
    Returns the slots of each layer, whole numbers.
    """
    return fewest_misses([_layer(curve) for curve in curves], room)


solution = divide


def _layer(curve: Curve) -> CachedLayer:
    """The CachedLayer that has this curve."""
    units = int(curve.slots[-1])
    misses = np.interp(np.array(CAPACITIES) * units, curve.slots, curve.misses)
    record = slot_shares.Curve(tuple(misses.tolist()))
    return CachedLayer(units, curve.slot_bytes, (0,), curve.least, record)


def curves_of(layers: Sequence[CachedLayer], room: int) -> list[Curve]:
    """The Curves of layers that were calibrated; each gets what one token needs, if that fits."""
    least = [max(layer.least, layer.slots_for(1)) for layer in layers]
    if slot_shares.nbytes(layers, least) > room:
        least = [layer.least for layer in layers]
    return [
        Curve(np.array(CAPACITIES) * layer.units, np.array(layer.record.misses),
              layer.slot_bytes, n)
        for layer, n in zip(layers, least, strict=True)
        if layer.record is not None
    ]  # fmt: skip


def examples(answer: Answer) -> None:
    """A few layers with convex curves; in some all slots fit."""
    random = np.random.default_rng(0)
    for number in range(60):
        curves = []
        for _ in range(int(random.integers(1, 5))):
            units, least = int(random.integers(8, 60)), int(random.integers(1, 4))
            slots = np.array(CAPACITIES) * units
            misses = random.uniform(1, 20) * np.exp(-random.uniform(0.5, 6) * slots / units)
            curves.append(Curve(slots, misses, int(random.integers(1, 4)) * 64, least))
        every = sum(c.slot_bytes * int(c.slots[-1]) for c in curves)
        room = sum(c.slot_bytes * c.least for c in curves) + int(random.integers(1, every))
        got = judged(answer, curves, room)
        best, reached = _misses(curves, divide(curves, room)), _misses(curves, got)
        if number < 20 and reached > MORE * best + 0.05 * len(curves):
            raise answer.wrong(
                f"of {len(curves)} layers and {room} bytes it gives {got} slots; then a token "
                f"misses {reached:.2f} neurons; {best:.2f} can be had"
            )


def judged(answer: Answer, curves: Sequence[Curve], room: int) -> list[int]:
    """The slots that the answer gives each layer. Raises Wrong where they do not fit."""
    copies = [c._replace(slots=c.slots.copy(), misses=c.misses.copy()) for c in curves]
    given = answer.array(answer(copies, room), np.int64, "what is given", (len(curves),)).tolist()
    case = f"of {len(curves)} layers and {room:,} bytes it gives {shown(np.array(given))} slots: "
    for i, (slots, curve) in enumerate(zip(given, curves, strict=True)):
        if not curve.least <= slots <= curve.slots[-1]:
            raise answer.wrong(
                f"{case}layer {i} must get from {curve.least} to {curve.slots[-1]:.0f}"
            )
    taken = sum(n * c.slot_bytes for n, c in zip(given, curves, strict=True))
    if taken > room:
        raise answer.wrong(f"{case}{taken:,} bytes, which is more than there are")
    return [int(n) for n in given]


def _misses(curves: Sequence[Curve], slots: Sequence[int]) -> float:
    """Neurons that a token misses, of all layers."""
    return sum(float(np.interp(n, c.slots, c.misses)) for n, c in zip(slots, curves, strict=True))


def grades(answer: Answer, progress: Callable[[float], None]) -> list[Grade]:
    """The demo model, its caches shared out by the answer."""
    ids = text()
    with opened() as model:
        own, own_slots = run(model, ids), model.plan.slots

    def ours(layers: Sequence[CachedLayer], room: int, passing: bool = False) -> list[int]:
        return judged(answer, curves_of(layers, room), room)

    with in_place_of(slot_shares, "fewest_misses", ours), opened() as model:
        got, slots = run(model, ids, progress), model.plan.slots
    held = sum(slots), sum(own_slots)
    return [
        Grade("bits of the logits", got.digest, own.digest),
        Grade("bytes of units read a token", got.nbytes, own.nbytes, MORE * own.nbytes),
        Grade("slots in all", held[0], held[1], held[1]),
    ]
