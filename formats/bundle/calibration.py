"""What calibration found of a model's layers, as a bundle's metadata holds it in JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from ..bounded_json import JsonObject
from ..errors import FormatError
from ..numbers import LARGEST_FLOAT32, is_number, is_whole

WINDOWS = 8  # calibration measures windows of 1 to 8 tokens
CAPACITIES = tuple(k / 16 for k in range(17))  # and caches that hold these shares of a layer
MOST = (1 << 31) - 1  # of any number in a layer's record
# Which neurons of a model without silent ones are taken as silent: see ``calibrate``.
Method = Literal["threshold", "cats", "teal"]
METHODS: tuple[Method, ...] = get_args(Method)


class PredictorForm(NamedTuple):
    """What a layer's predictor computes between its two maps, and what it reads."""

    between: Literal["", "relu"]
    reads: Literal["normed", "residual"]  # the FFN's normalised input, or the residual stream


TRAINED = PredictorForm("", "normed")  # of the predictors that calibration trains
POWERINFER = PredictorForm("relu", "residual")
PREDICTOR_FORMS = (TRAINED, POWERINFER)


class Cut(NamedTuple):
    """The threshold below which a layer's neurons are taken as silent, and ``calibrate``'s method
    of comparing them with it."""

    method: Method
    threshold: float


@dataclass(frozen=True)
class Sparsity:
    """The share ``target`` of each layer's neurons that is taken as silent, and by which method."""

    method: Method
    target: float


@dataclass(frozen=True)
class LayerCalibration:
    """What calibration found of the units of one layer: its neurons, or its experts.

    active            share of the neurons that fire for a token, or of the experts that it uses
    predicted         share of the units that the predictor or router names
    missed            share of the active units that are not named
    rank              the predictor's; 0: none
    window_rows       units that windows of 1, 2, ... WINDOWS tokens need, on average
    window_rows_most  the same at most
    misses            units to read per token with caches of CAPACITIES
    tried             {kind: [predicted, missed]} of the predictors that were compared; only shown,
                      and not checked where it comes from a file
    cut               the Cut where a target sparsity was asked for
    uses              (experts,): of a mixture, the share of the tokens that used each expert
    guessed           share of the units used that were named one layer early
    surest            share of the surer half of an early router's choice that was used
    reads             reads that missing neurons take where they lie beside those that they fire
                      with, as a share of what as many of any take; None: there is no such layout
    The last six are None where they are not known.
    """

    active: float
    predicted: float
    missed: float
    rank: int
    window_rows: tuple[float, ...]
    window_rows_most: tuple[float, ...]
    misses: tuple[float, ...]
    tried: Any = None
    cut: Cut | None = None
    uses: tuple[float, ...] | None = None
    guessed: float | None = None
    surest: float | None = None
    reads: float | None = None

    def as_json(self) -> JsonObject:
        return _known(
            {
                "active": self.active,
                "predicted": self.predicted,
                "missed": self.missed,
                "rank": self.rank,
                "tried": self.tried,
                "threshold": None if self.cut is None else self.cut.threshold,
                "window_rows": list(self.window_rows),
                "window_rows_most": list(self.window_rows_most),
                "misses": list(self.misses),
                "uses": None if self.uses is None else list(self.uses),
                "guessed": self.guessed,
                "surest": self.surest,
                "reads": self.reads,
            }
        )


@dataclass(frozen=True)
class Calibration:
    """What calibration found of a model.

    layers        one entry a layer; None for a layer of which nothing was recorded
    text, tokens  the text's name and how many of its tokens were used; only shown, and not checked
                  where they come from a file
    predictor     the form of all layers' predictors
    sparsity      None where the model's neurons are silent by themselves
    """

    layers: tuple[LayerCalibration | None, ...]
    text: Any = None
    tokens: Any = None
    predictor: PredictorForm = TRAINED
    sparsity: Sparsity | None = None

    @property
    def recorded(self) -> tuple[LayerCalibration, ...]:
        """The layers of which something was recorded, in order."""
        return tuple(layer for layer in self.layers if layer is not None)

    def as_json(self) -> JsonObject:
        """The JSON object that a bundle holds, and which ``calibration_from_json`` reads."""
        return _known(
            {
                "text": self.text,
                "tokens": self.tokens,
                "layers": [None if layer is None else layer.as_json() for layer in self.layers],
                "predictor": None if self.predictor == TRAINED else self.predictor._asdict(),
                "sparsity": None if self.sparsity is None else asdict(self.sparsity),
            }
        )


def _known(values: JsonObject) -> JsonObject:
    """The entries whose value is known: not None."""
    return {key: value for key, value in values.items() if value is not None}


def calibration_from_json(found: JsonObject, experts: Sequence[int | None]) -> Calibration | None:
    """The Calibration that a JSON object describes, or None where it is empty.

    experts  of each layer the number of experts whose ``uses`` its record must hold: 0 for a layer
             of neurons; None for a layer whose record must be null
    Raises FormatError where the object is not a sound calibration of such layers.
    """
    if not found:
        return None
    layers = found.get("layers")
    if not isinstance(layers, list) or len(layers) != len(experts):
        raise FormatError("its calibration is not that of this model; calibrate it again")
    form = found.get("predictor", TRAINED._asdict())
    forms = [known for known in PREDICTOR_FORMS if known._asdict() == form]
    if not forms:
        raise FormatError("its predictors have an unknown form; calibrate it again")
    sparsity = _sparsity(found.get("sparsity"))
    records = tuple(
        None if n is None and layer is None else _layer(layer, n, sparsity)
        for layer, n in zip(layers, experts, strict=True)
    )
    return Calibration(records, found.get("text"), found.get("tokens"), forms[0], sparsity)


def _sparsity(value: Any) -> Sparsity | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("method") not in METHODS:
        raise _damaged()
    return Sparsity(value["method"], _number(value, "target", most=1))


def _layer(record: Any, n_experts: int | None, sparsity: Sparsity | None) -> LayerCalibration:
    """The LayerCalibration of an object that must hold the numbers of such a layer."""
    if not isinstance(record, dict) or n_experts is None:
        raise _damaged()
    rank, cut = record.get("rank"), None
    if not is_whole(rank, 0, MOST):
        raise _damaged()
    if sparsity is not None:
        threshold = _number(record, "threshold", -LARGEST_FLOAT32, LARGEST_FLOAT32)
        cut = Cut(sparsity.method, threshold)
    return LayerCalibration(
        active=_number(record, "active", most=1),
        predicted=_number(record, "predicted", most=1),
        missed=_number(record, "missed", most=1),
        rank=rank,
        window_rows=_rising(record, "window_rows"),
        window_rows_most=_rising(record, "window_rows_most"),
        misses=_numbers(record, "misses", len(CAPACITIES)),
        tried=record.get("tried"),
        cut=cut,
        uses=_numbers({"uses": [], **record}, "uses", n_experts, most=1) or None,
        guessed=_number(record, "guessed", most=1) if "guessed" in record else None,
        surest=_number(record, "surest", most=1) if "surest" in record else None,
        reads=_number(record, "reads") if "reads" in record else None,
    )


def _number(values: JsonObject, key: str, least: float = 0, most: float = MOST) -> float:
    value = values.get(key)
    if not is_number(value, least, most):
        raise _damaged()
    return value


def _numbers(values: JsonObject, key: str, length: int, most: float = MOST) -> tuple[float, ...]:
    numbers = values.get(key)
    if not isinstance(numbers, list) or len(numbers) != length:
        raise _damaged()
    if not all(is_number(number, 0, most) for number in numbers):
        raise _damaged()
    return tuple(numbers)


def _rising(values: JsonObject, key: str) -> tuple[float, ...]:
    """What windows of more and more tokens need, which is never less."""
    numbers = _numbers(values, key, WINDOWS)
    if list(numbers) != sorted(numbers):
        raise _damaged()
    return numbers


def _damaged() -> FormatError:
    return FormatError("its calibration is damaged; calibrate it again")
