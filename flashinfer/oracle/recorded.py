"""What a trace holds of a model's values, in the shapes and orders of the model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from flashinfer.formats.architectures import architecture, model_config
from flashinfer.formats.arrays import AnyArray, Int64Array
from flashinfer.formats.errors import FormatError
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.oracle.replay import Place
from flashinfer.oracle.trace_file import Trace
from flashinfer.transformer.values import Value, values_of


class Recorded(Mapping[Place, AnyArray]):
    """The values of a Trace by their places, each read when it is asked for.

    Raises FormatError where one has not the shape that the model's config gives it.
    """

    def __init__(self, trace: Trace, values: Sequence[Value]) -> None:
        self.trace = trace
        held = set(trace.names)
        self.experts = {v.layer: v.shape[0] for v in values if v.key == "router"}
        self.by_place = {(v.layer, v.key): v for v in values if v.name in held}
        for layer, key in list(self.by_place):
            # Whose weights these are is said by the choices alone.
            if key == "choice_weights" and (layer, "choices") not in self.by_place:
                del self.by_place[layer, key]
        self.last: tuple[Place, AnyArray] | None = None

    def __getitem__(self, place: Place) -> AnyArray:
        if self.last is None or self.last[0] != place:
            self.last = place, self._read(place)
        return self.last[1]

    def _read(self, place: Place) -> AnyArray:
        layer, key = place
        array = self._shaped(place)
        if key not in ("choices", "choice_weights"):
            return array
        # Engines name a token's experts in orders of their own; here they ascend.
        order = np.argsort(self._choices(layer), axis=1)
        return np.take_along_axis(array, order, axis=1)

    def _shaped(self, place: Place) -> AnyArray:
        value = self.by_place[place]
        return shaped(self.trace.read(value.name), value, self.trace.path)

    def _choices(self, layer: int | None) -> AnyArray:
        """Ids of experts, each of which exists."""
        name, experts = self.by_place[layer, "choices"].name, self.experts[layer]
        found = self._shaped((layer, "choices"))
        if found.dtype.kind not in "iu":
            raise FormatError(f"{self.trace.path}: tensor {name} holds no whole numbers")
        strange = found[(found < 0) | (found >= experts)]
        if strange.size:
            raise FormatError(
                f"{self.trace.path}: tensor {name} holds the expert {strange[0]}; there are 0 to "
                f"{experts - 1}"
            )
        return found

    def __contains__(self, place: object) -> bool:
        return place in self.by_place

    def __iter__(self) -> Iterator[Place]:
        return iter(self.by_place)

    def __len__(self) -> int:
        return len(self.by_place)


def shaped(array: AnyArray, value: Value, path: Path | str) -> AnyArray:
    """``array`` (T, ...) in the shape of a value. Raises FormatError."""
    if math.prod(array.shape[1:]) != math.prod(value.shape):
        raise FormatError(
            f"{path}: tensor {value.name} has the shape {list(array.shape[1:])} for each token, "
            f"the model's config says {list(value.shape)}"
        )
    return array.reshape(len(array), *value.shape)


def refuse_strangers(weights: ModelWeights, trace: Trace, values: Sequence[Value]) -> None:
    """Raise FormatError where ``trace`` cannot be one of this model."""
    if trace.mode == "predicted":
        raise FormatError(
            f"{trace.path}: is a trace of predicted neurons only; what is judged is a run of all "
            "of them, such as one with --neurons dense"
        )
    refuse_text(weights, trace.tokens, trace.path)
    if trace.config:
        try:
            theirs = values_of(model_config(trace.config), architecture(trace.config))
        except FormatError as error:
            raise FormatError(f"{trace.path}: {error}") from None
        if theirs != list(values):
            raise FormatError(f"{trace.path}: its config says that it is a trace of another model")
    known = {value.name for value in values}
    strange = [name for name in trace.names if name not in known]
    # Logits have the same name in every model.
    if len(strange) == len(trace.names) or (strange and known & set(trace.names) == {"logits"}):
        some = ", ".join(strange[:2]) or "none"
        raise FormatError(
            f"{trace.path}: has no value of this model (it has {some}; the model "
            f"{values[1].name}): a trace of another model, or one that needs a name map"
        )


def refuse_text(weights: ModelWeights, tokens: Int64Array, where: Path | str) -> None:
    """Raise FormatError, which names ``where``, where the model cannot run these tokens."""
    longest, vocabulary = weights.config.max_position_embeddings, weights.config.vocab_size
    if len(tokens) > longest:
        raise FormatError(
            f"{where}: has {len(tokens):,} tokens, more than the {longest:,} that the model has "
            "positions for"
        )
    most = int(tokens.max())
    if most >= vocabulary:
        raise FormatError(
            f"{where}: token id {most} is not within the model's vocabulary of {vocabulary}: "
            "a trace of another model?"
        )
