"""Random weights of a model, and how a checkpoint names and packs them.

It is the inverse of formats/sources/names.py, which finds our tensors in a checkpoint, and reads
the same descriptions: an architecture's module, or the ``Naming`` of a GGUF file.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from flashinfer.formats.architectures import falcon
from flashinfer.formats.architectures.hugging_face import Rows
from flashinfer.formats.arrays import AnyArray, Float32Array
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.layers.layer import LayerConfig
from flashinfer.formats.sources.names import number_there, part_of
from flashinfer.formats.tensors import FFN, TensorSpec
from flashinfer.oracle.kits.configs import KitModel
from flashinfer.oracle.kits.draws import power_of_two, uniform

Tensors = dict[str, AnyArray]  # {name in a checkpoint: values}
Draw = Callable[[str, tuple[int, ...]], Float32Array]  # (our tensor, its shape) -> its values


@dataclass(frozen=True)
class Form:
    """How a checkpoint names and packs tensors.

    names       {our tensor: the checkpoint's}, {} is the layer
    experts     {"gate", "up", "down": the checkpoint's tensor} of layers with experts
    dense       the same of layers without
    rows        {our projection: which rows of a packed tensor it is} of layers with experts
    dense_rows  the same of layers without
    last        of several names of a tensor, separated by "|", the last one is meant, else the
                first
    turned      the parts, as in ``rows``, whose matrices have rows and columns exchanged
    one_row     our vectors that are matrices of one row
    turned_heads  {our projection: how many matrices lie below each other in it, of a LayerConfig,
                of which each has rows and columns exchanged}
    convolutions  our matrices (channels, kernel) that are (channels, 1, kernel)
    stacked     our tensors of which those of all layers are one tensor, below each other
    number      (our tensor, layer) -> the number that the checkpoint has for the layer
    numbered    {our matrix of hidden states: its number among those below each other in one tensor}
    values      {our vector: the function of what is drawn for it whose values are held}
    """

    names: Mapping[str, str]
    experts: Mapping[str, str]
    dense: Mapping[str, str]
    rows: Mapping[str, Rows]
    dense_rows: Mapping[str, Rows]
    last: bool = False
    turned: Collection[str] = ()
    one_row: Collection[str] = ()
    convolutions: Collection[str] = ()
    turned_heads: Mapping[str, Callable[[LayerConfig], int]] = field(default_factory=dict)
    stacked: Collection[str] = ()
    values: Mapping[str, Callable[[Float32Array], Float32Array]] = field(default_factory=dict)
    numbered: Mapping[str, int] = field(default_factory=dict)
    number: Callable[[str, int], int] = lambda template, layer: layer

    def name(self, template: str, layer: int | None, router: bool) -> str:
        """The checkpoint's name of our tensor ``template``, in which {expert} may be left.

        router  whether the layer has experts
        """
        named = self.names.get(template, template)
        if template.startswith("layers.{}.ffn."):
            named = (self.experts if router else self.dense).get(part_of(template), named)
        named = named.split("|")[-1 if self.last else 0]
        if layer is None:
            return named
        return named.replace("{}", str(self.number(template, layer)))


def hugging_face_form(model: KitModel, config: ModelConfig, module: Any) -> Form:
    """The Form of a model's Hugging Face checkpoint; module: the architecture's."""
    fused = model.packing == "fused"
    experts, rows = module.FFN, getattr(module, "ROWS", {})
    dense, dense_rows = getattr(module, "DENSE_FFN", module.FFN), rows
    if fused and hasattr(module, "FUSED_FFN"):
        experts, rows = module.FUSED_FFN, {**rows, **module.FUSED_ROWS}
    # Falcon's two norms side by side have names of their own.
    two_norms = module is falcon and any(
        layer.parallel and not layer.shared_norm for layer in config.layers
    )
    turned, one_row, convolutions = (
        getattr(module, key, ()) for key in ("TURNED", "ONE_ROW", "CONVOLUTIONS")
    )
    last, names = fused or two_norms, module.NAMES
    heads = getattr(module, "TURNED_HEADS", {})
    return Form(
        names, experts, dense, rows, dense_rows, last, turned, one_row, convolutions, heads,
        getattr(module, "STACKED", ()), number=partial(number_there, module, config),
    )  # fmt: skip


def checkpoint_tensors(
    config: ModelConfig, form: Form, draw: Draw, specs: Iterable[TensorSpec]
) -> Tensors:
    """{the checkpoint's name: float32} of a model's weights.

    draw   (our tensor's name, its shape) -> its values; of a layer's neurons "layers.N.ffn.gate" is
           one matrix, with a first dimension for the expert where there are some
    specs  of the tensors that are wanted: all of the model's or of some of its layers
    Experts that lie in one tensor have the shape (experts, rows, columns), their biases (experts,
    rows).
    """
    found: Tensors = {}
    turned: set[str] = set()
    for spec in specs:
        for template, values in _parts(spec, config, draw):
            if template in form.values:
                values = form.values[template](values)
            router = spec.layer is not None and config.layers[spec.layer].ffn.router is not None
            name = form.name(template, spec.layer, router)
            heads = form.turned_heads.get(part_of(template))
            if heads is not None and spec.layer is not None:
                count, columns = heads(config.layers[spec.layer]), values.shape[1]
                values = values.reshape(count, -1, columns).swapaxes(1, 2)
                values = values.reshape(count * columns, -1)
            if part_of(template) in form.turned and values.ndim > 1:
                turned.add(name)
            rows = (form.rows if router else form.dense_rows).get(part_of(template))
            number = spec.layer if template in form.stacked else form.numbered.get(template)
            if number is not None:
                ids = number * len(values) + np.arange(len(values))
                _put(found, name, values, ids, axis=0)
                continue
            if "{expert}" in name:
                for expert, matrix in enumerate(values):
                    found[name.replace("{expert}", str(expert))] = matrix
            elif rows is None or spec.layer is None:
                values = values[None] if template in form.one_row else values
                found[name] = values[:, None] if template in form.convolutions else values
            else:
                axis = 1 if router and template.startswith("layers.{}.ffn.") else 0
                ids = rows(config.layers[spec.layer])
                _put(found, name, values, ids, axis)
    for name in (n for n in turned if not n.endswith("_mxfp4")):
        found[name] = found[name].swapaxes(-1, -2)
    return found


def _put(found: Tensors, name: str, values: AnyArray, ids: AnyArray, axis: int) -> None:
    """Put ``values`` in the places ``ids`` along an axis of the packed tensor ``name``, which grows
    to hold them."""
    held, values = found.get(name), np.moveaxis(values, axis, 0)
    height = int(ids.max()) + 1 if held is None else max(int(ids.max()) + 1, held.shape[axis])
    whole = np.zeros((height, *values.shape[1:]), dtype=values.dtype)
    if held is not None:
        whole[: held.shape[axis]] = np.moveaxis(held, axis, 0)
    whole[ids] = values
    found[name] = np.moveaxis(whole, 0, axis)


def _parts(spec: TensorSpec, config: ModelConfig, draw: Draw) -> Iterator[tuple[str, Float32Array]]:
    """Yield (our tensor's name with {} for the layer, its values) of a tensor, or of the matrices
    that bundles are made of; those of experts have a first dimension for the expert."""
    template = spec.name
    if spec.layer is None:
        yield template, draw(spec.name, spec.shape)
        return
    template = template.replace(f"layers.{spec.layer}.", "layers.{}.", 1)
    ffn = config.layers[spec.layer].ffn
    experts = (ffn.experts,) if ffn.router else ()
    if spec.role == FFN:
        d, n = ffn.hidden_size, ffn.d_ffn
        shapes = {"gate": (n, d), "up": (n, d), "down": (d, n)}
        for part in ("gate", "up", "down") if ffn.gated else ("up", "down"):
            name = f"layers.{spec.layer}.ffn.{part}"
            yield f"layers.{{}}.ffn.{part}", draw(name, (*experts, *shapes[part]))
        return
    values = draw(spec.name, spec.shape)
    if experts and ".ffn." in template:  # the biases of all experts
        values = values.reshape(*experts, -1)
    yield template, values


def drawn(config: ModelConfig, label: str, name: str, shape: tuple[int, ...]) -> Float32Array:
    """Random values of our tensor ``name``, such that activations and logits are about 1.

    Norms' weights are about 1, biases small. What a matrix of ``columns`` makes of values of about
    1 is about 1 again. ``label`` is the model's.
    """
    values = uniform(f"{label} {name}", shape)
    if name.endswith(("norm.weight", "gated.weight", "_scale", "expert_scales")):
        return np.float32(1) + values / np.float32(4)
    if name.endswith("bias"):
        return values / np.float32(8)
    if name.endswith("sinks"):
        return values
    if name == "embed_tokens.weight":
        return values * np.float32(power_of_two(1 / config.embedding_scale))
    if name == "embed_positions.weight":
        return values / np.float32(2)
    return values * np.float32(power_of_two((3 / shape[-1]) ** 0.5))
