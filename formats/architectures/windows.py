"""Which layers' attention sees a window only, as Hugging Face's configs say it."""

from ..config import dimension, flag
from ..errors import FormatError, shown
from ..numbers import is_whole

# What a layer's attention may be called, and whether it sees its window only.
LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}


def _slides(config, layers, default):
    """Whether each layer sees its window only, by ``layer_types``, or by ``default`` (of a layer's
    number) where a config has none."""
    kinds = config["layer_types"]
    if kinds is None:
        return [default(layer) for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise FormatError(f"config: layer_types is {shown(kinds)}, not a list of {layers}")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in LAYER_TYPES:
            raise FormatError(
                f"config: layer_types has {shown(kind)}; supported: {', '.join(LAYER_TYPES)}"
            )
    return [LAYER_TYPES[kind] for kind in kinds]


def layer_windows(config, layers, default):
    """ModelConfig's ``sliding_windows`` where ``layer_types`` or ``default`` says which slide."""
    return _windows(config, _slides(config, layers, default))


def _windows(config, sliding):
    """``sliding_window`` of the layers that are sliding, 0 of the others."""
    if not any(sliding):
        return ()
    window = dimension(config, "sliding_window")
    return tuple(window if slides else 0 for slides in sliding)


def switched_windows(config, layers, default):
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


def one_window(config, layers):
    """ModelConfig's ``sliding_windows`` where all layers have the same, or all have none."""
    return _windows(config, [config["sliding_window"] is not None] * layers)
