"""What architectures with recurrent layers share."""

from decimal import Context, Decimal

import numpy as np

from ..arrays import Float32Array
from ..errors import FormatError, shown
from ..fields import Fields, dimension

DIGITS = Context(prec=40, Emin=-999_999, Emax=999_999, traps=[])
LAYER_TYPES = {"full_attention": True, "attention": True, "linear_attention": False}


def minus_exp(values: Float32Array) -> Float32Array:
    """-e^x of a few values, rounded to the nearest float32: the same everywhere."""
    powers = [float(DIGITS.exp(Decimal(float(value)))) for value in values.ravel()]
    with np.errstate(over="ignore"):
        return -np.array(powers, dtype=np.float32).reshape(values.shape)


def attending(config: Fields, layers: int) -> list[bool]:
    """Whether each layer has attention, by ``layer_types`` or by ``full_attention_interval``."""
    kinds = config["layer_types"]
    if kinds is None:
        every = dimension(config, "full_attention_interval")
        return [(layer + 1) % every == 0 for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise FormatError(f"config: layer_types is {shown(kinds)}, not a list of {layers}")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in LAYER_TYPES:
            raise FormatError(
                f"config: layer_types has {shown(kind)}; supported: {', '.join(LAYER_TYPES)}"
            )
    return [LAYER_TYPES[kind] for kind in kinds]
