"""What architectures with recurrent layers share."""

from decimal import Context, Decimal

import numpy as np

from ..arrays import Float32Array
from ..fields import Fields, dimension, of_layers

# Decimal arithmetic has the same digits on every machine, which NumPy's exp has not.
DIGITS = Context(prec=40, Emin=-999_999, Emax=999_999, traps=[])
LAYER_TYPES = {"full_attention": True, "attention": True, "linear_attention": False}


def decays(logarithms: Float32Array) -> Float32Array:
    """-exp(A_log), rounded to the nearest float32."""
    exact = [float(DIGITS.exp(Decimal(float(value)))) for value in logarithms.ravel()]
    with np.errstate(over="ignore"):
        return -np.array(exact, dtype=np.float32).reshape(logarithms.shape)


CONVOLUTIONS = ("layers.{}.conv.weight",)
VALUES = {"layers.{}.decay": decays}


def attending(config: Fields, layers: int) -> list[bool]:
    """Whether each layer has attention, by ``layer_types`` or by ``full_attention_interval``."""
    kinds = config["layer_types"]
    if kinds is None:
        every = dimension(config, "full_attention_interval")
        return [(layer + 1) % every == 0 for layer in range(layers)]
    return of_layers("layer_types", kinds, LAYER_TYPES, layers)
