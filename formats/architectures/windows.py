"""Which layers' attention sees a window only, as Hugging Face's configs say it."""

from collections.abc import Callable, Sequence

from ..config import ByLayer
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag, of_layers
from ..numbers import is_whole

# What a layer's attention may be called, and whether it sees its window only.
LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}


def _slides(config: Fields, layers: int, default: Callable[[int], bool]) -> list[bool]:
    """Whether each layer sees its window only, by ``layer_types``, or by ``default`` (of a layer's
    number) where a config has none."""
    kinds = config["layer_types"]
    if kinds is None:
        return [default(layer) for layer in range(layers)]
    return of_layers("layer_types", kinds, LAYER_TYPES, layers)


def layer_windows(config: Fields, layers: int, default: Callable[[int], bool]) -> ByLayer:
    """Each layer's ``attention_window``, as ``model_of`` takes what layers have of their own, where
    ``layer_types`` or ``default`` says which slide; empty where none does."""
    return _windows(config, _slides(config, layers, default))


def _windows(config: Fields, sliding: Sequence[bool]) -> ByLayer:
    if not any(sliding):
        return ()
    window = dimension(config, "sliding_window")
    return [{"attention_window": window} if slides else {} for slides in sliding]


def switched_windows(config: Fields, layers: int, default: Callable[[int, int], bool]) -> ByLayer:
    """The same where ``use_sliding_window`` switches the windows on.

    default  called as default(layer, max_window_layers) where ``layer_types`` is absent
    """
    used, first = flag(config, "use_sliding_window"), config["max_window_layers"]
    if not is_whole(first):
        raise FormatError(f"config: max_window_layers is {shown(first)}, not a whole number")
    there = used and config["sliding_window"] is not None
    sliding = _slides(config, layers, lambda layer: there and default(layer, first))
    if any(sliding) and not used:
        raise FormatError("config: layer_types has sliding_attention, use_sliding_window is false")
    return _windows(config, sliding)


def one_window(config: Fields, layers: int) -> ByLayer:
    """The same where all layers have one window, or none has any."""
    return _windows(config, [config["sliding_window"] is not None] * layers)
