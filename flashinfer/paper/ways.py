"""How a layer runs: the one place where that is chosen, for the engine and for the cost model."""

from collections.abc import Callable

# A prompt's neurons together near the whole layer. Reading all of it in large pieces is then
# faster than reading most of it in small ones.
STREAM_SHARE = 0.3
WAVE_BYTES = 8 << 20  # of large units, read while as many are computed

WHOLE, STREAMED, CACHED, WAVES = "whole", "streamed", "cached", "waves"


def way_to_run(
    *,
    whole: bool,
    chosen: bool,
    units: int,
    slots: int,
    unit_neurons: int,
    tokens: int,
    used: float,
    missing: Callable[[], float],
) -> str:
    """WHOLE, STREAMED, CACHED or WAVES.

    whole    every unit is in DRAM and stays there
    chosen   a predictor or a router chose units; else all of them are used
    units    of the layer; slots: of its neuron cache; unit_neurons: of each unit
    tokens   that are computed together; used: units that they use
    missing  a function without arguments: how many of these are not in the cache
    """
    if whole:
        return WHOLE
    if not chosen:
        return STREAMED
    # An expert is multiplied with its own tokens only, one expert after the other.
    one_by_one = unit_neurons > 1 and tokens > 1
    if tokens > 1 and unit_neurons == 1 and missing() > STREAM_SHARE * units:
        return STREAMED
    return CACHED if used <= slots and not one_by_one else WAVES


def wave_size(slots: int, unit_neurons: int, stride: int) -> tuple[int, bool]:
    """(units of a wave, whether one wave is read while the one before it is computed).

    stride  bytes of a slot
    """
    size = max(1, slots // 2)
    if unit_neurons > 1:
        size = min(size, max(1, WAVE_BYTES // stride))
    return size, 2 * size <= slots


def may_prefetch(*, whole: bool, chosen: bool, borrowed: bool, in_dram: bool, share: float) -> bool:
    """Whether a layer's units may be read before its turn.

    borrowed  its slots are other layers' as well
    in_dram   what guesses is in DRAM; else it would be streamed twice
    share     of what is guessed, that the plan has read before its turn
    """
    return chosen and in_dram and share > 0 and not whole and not borrowed


def prefetch_fits(guessed: float, per_token: int, slots: int) -> bool:
    """Whether the slots hold so many guessed units, and all experts that a token needs."""
    return max(guessed, per_token) <= slots
