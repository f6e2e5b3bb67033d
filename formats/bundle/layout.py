"""Which tensors a bundle holds, in which order, and what each is for.

The order is the order on flash: what must stay in DRAM first, so that opening a model is one
sequential read; then what is read row by row; then the FFN, one tensor of bundles a layer. A reader
finds tensors by name, so that another order is no other version of the file.
"""

from collections.abc import Sequence

import numpy as np

from ..arrays import AnyArray
from ..config import ModelConfig
from ..number_formats import FORMATS, NumberFormat
from ..tensors import FFN, PREDICTOR, ROLES, TensorSpec

F16 = FORMATS["f16"]
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"


def bundles_name(layer: int) -> str:
    """The tensor of a layer's FFN."""
    return f"layers.{layer}.ffn.bundles"


def places_name(layer: int) -> str:
    """The tensor, (neurons,) I32, that says where each neuron of a layer lies, in rows of its
    bundles; a file in which neurons lie by their numbers has none."""
    return f"layers.{layer}.ffn.places"


def layout(config: ModelConfig) -> list[TensorSpec]:
    """The TensorSpecs of a model, without predictors, in file order."""
    specs = config.tensors()
    for number, layer in enumerate(config.layers):
        specs += layer.tensors(f"layers.{number}")
    return sorted(specs, key=lambda spec: ROLES.index(spec.role))


def bundled(parts: Sequence[AnyArray]) -> AnyArray:
    """Bundles (paper section 3.2): parts (n, width) each, the rows of gate and up and the columns
    of the down projection -> (n, parts * width), all of neuron i in row i."""
    return np.concatenate(parts, axis=1)


def predictor_layout(config: ModelConfig, ranks: Sequence[int]) -> list[TensorSpec]:
    """The TensorSpecs of the layers' predictors, of these ranks; there may be none."""
    specs = []
    for number, rank in enumerate(ranks):
        specs += config.layers[number].ffn.predictor_tensors(f"layers.{number}", rank)
    return specs


def format_of(spec: TensorSpec, ffn: NumberFormat = F16, dense: NumberFormat = F16) -> NumberFormat:
    """The NumberFormat of a tensor: norms f32, predictors f16, FFN and the others as asked for.

    Positions, one small row a token, keep 16 bits where the others have fewer; and so does what
    makes keys of latents, whose rows are as short as a head, where they are no whole blocks.
    """
    if spec.exact:
        return FORMATS["f32"]
    if spec.role == PREDICTOR or (spec.name == "embed_positions.weight" and dense.block > 1):
        return F16
    if spec.name.endswith(".k_b_proj.weight") and spec.shape[1] % dense.block:
        return F16
    return ffn if spec.role == FFN else dense
