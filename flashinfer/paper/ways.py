"""How a layer runs: the one place where that is chosen, for the engine and for the cost model."""

from collections.abc import Callable
from typing import NamedTuple

# A prompt's neurons together near the whole layer. Reading all of it in large pieces is then
# faster than reading most of it in small ones.
STREAM_SHARE = 0.3
WAVE_BYTES = 8 << 20  # of large units, read while as many are computed
FILLING_BYTES = 256 << 10  # of reads that are as fast one after the other as together
MOST_WAVES = 3  # one that is computed, and those that are read meanwhile

WHOLE, STREAMED, CACHED, WAVES = "whole", "streamed", "cached", "waves"


class Residence(NamedTuple):
    """What of a layer is in DRAM.

    chosen        a predictor or a router chooses units; else all of them are used
    units         of the layer; unit_neurons: of each unit
    slots         of its neuron cache
    whole         every unit is in DRAM and stays there
    transit       slots that all layers use in turn, for units that are not kept
    early         its router chooses before the layer's tokens are mixed
    """

    chosen: bool
    units: int
    unit_neurons: int
    slots: int
    whole: bool = False
    transit: int = 0
    early: bool = False


def way_to_run(layer: Residence, tokens: int, used: float, missing: Callable[[], float]) -> str:
    """WHOLE, STREAMED, CACHED or WAVES.

    tokens   that are computed together; used: units that they use
    missing  a function without arguments: how many of these are not in the cache
    """
    if layer.whole:
        return WHOLE
    if not layer.chosen:
        return STREAMED
    # An expert is multiplied with its own tokens only, one expert after the other.
    one_by_one = layer.unit_neurons > 1 and tokens > 1
    if tokens > 1 and layer.unit_neurons == 1 and missing() > STREAM_SHARE * layer.units:
        return STREAMED
    return CACHED if used <= layer.slots and not one_by_one else WAVES


def wave_size(slots: int, transit: int, unit_neurons: int, slot_bytes: int) -> tuple[int, int]:
    """(units of a wave, how many waves are read while the one before them is computed).

    slots, transit, unit_neurons  as a Residence's; slot_bytes: bytes of a slot
    """
    room = transit or slots
    size = max(1, room // 2)
    if unit_neurons > 1:
        size = min(size, max(1, WAVE_BYTES // slot_bytes))
    return size, min(room // size, MOST_WAVES) - 1


def transit_slots(per_token: int, slot_bytes: int) -> int:
    """How many slots in transit are worth having, where a token uses so many units of a layer: for
    a wave that is computed, and one that is read."""
    return min(per_token, 2 * max(1, WAVE_BYTES // slot_bytes))


def may_prefetch(layer: Residence, in_dram: bool, share: float) -> bool:
    """Whether a layer's units may be guessed, and read before its turn.

    in_dram  what guesses is in DRAM; else it would be streamed twice
    share    of what is guessed, that the plan has read before its turn
    """
    return layer.chosen and in_dram and share > 0 and not layer.whole


def reads_early(layer: Residence, tokens: int, used: float) -> bool:
    """Whether the units that a router has chosen are read while the layer's tokens are mixed."""
    return layer.early and tokens == 1 and not layer.whole and used <= layer.slots


def prefetch_fits(guessed: float, routed: int, slots: int) -> bool:
    """Whether the slots hold so many guessed units, and all that a router chooses for a token."""
    return max(guessed, routed) <= slots


def prefetch_waits(unit_bytes: int) -> bool:
    """Whether a layer's units are prefetched only when the reads of the layer before it are done,
    rather than behind them.

    Behind them they would delay them: a device shares its bandwidth among all reads in flight, and
    some tell that one is done only when all are. Small reads, though, want many in flight.
    """
    return unit_bytes >= FILLING_BYTES
