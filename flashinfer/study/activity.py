"""Which units of a model texts use: of each layer's neurons those that fire, of its experts those
that are chosen."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.calibration.firing import exact_feed_forward, piece_values
from flashinfer.calibration.routing import in_pieces, router_of
from flashinfer.calibration.text_states import TextStates
from flashinfer.formats.arrays import BoolArray, Float32Array, UInt8Array
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.model import Model
from flashinfer.paper.feedforward import FeedForward
from flashinfer.plan.options import Options
from flashinfer.plan.profile import Profile

SEQUENCE = 256  # tokens that attend to each other


@dataclass(frozen=True)
class Sample:
    """A text to study: its name, and its token ids."""

    name: str
    ids: Sequence[int]


@dataclass(frozen=True)
class Study:
    """What is studied.

    path      of the bundle; samples: texts, the first of which stands for all where one will do
    options   how to open it; profile: of this machine and its flash
    progress  is told the layers done, as the experiment's name
    """

    path: Path
    samples: Sequence[Sample]
    options: Options
    profile: Profile
    progress: Progress = field(default=no_progress)

    def open(self, **changes: Any) -> Model:
        """The model, with some options changed."""
        return Model.open(self.path, replace(self.options, **changes))

    def bundle(self) -> Bundle:
        """The bundle."""
        return Bundle(self.path)


@dataclass(frozen=True)
class Used:
    """Of a layer, which tokens used which of its units.

    bits    (units, ceil(T / 8)): packed, a row a unit
    tokens  T; nbytes: of a unit in the file
    ffn     the layer's FFN, whose inputs were x (T, d_model); while it is computed
    """

    bits: UInt8Array
    tokens: int
    nbytes: int
    ffn: FeedForward | None = None
    x: Float32Array | None = None

    @property
    def units(self) -> int:
        return len(self.bits)

    def by_token(self, first: int, stop: int) -> BoolArray:
        """Which units the tokens first:stop used, (stop - first, units); first is a multiple of
        8."""
        packed = self.bits[:, first // 8 : -(-stop // 8)]
        return np.unpackbits(packed, axis=1, count=stop - first).T.astype(bool)

    def counts(self) -> np.ndarray:
        """How many tokens used each unit, (units,)."""
        return np.bitwise_count(self.bits).sum(axis=1, dtype=np.int64)

    @property
    def share(self) -> float:
        """The share of the units that a token uses."""
        return float(self.counts().sum() / (self.units * self.tokens))


def activity(study: Study, sample: Sample, what: str, inputs: bool = False) -> Iterator[Used]:
    """Yield of each layer which units a text uses, computed with all neurons.

    what    the name under which progress is told
    inputs  with the FFNs and their inputs
    Raises UserError where no unit can be silent.
    """
    sequence = min(SEQUENCE, len(sample.ids), study.options.context or SEQUENCE)
    with study.open(neurons="dense", context=sequence, draft="off") as model:
        config = model.config
        if not config.sparse and not config.reads_experts:
            raise UserError(
                f"{study.path}: every neuron of this model fires for every token (its activation "
                f"is {config.activations}); a model with a ReLU or with experts has units to skip"
            )
        states = TextStates(model, np.asarray(sample.ids), sequence)
        for number, layer in enumerate(model.layers):
            study.progress(what, number, len(model.layers))
            ffn = layer.feed_forward
            x, residual = states.attend(layer)
            router = router_of(ffn)
            whole = ffn.neurons.config.matrices  # a layer without experts, all of which is one unit
            if router is None and not whole:
                piece = piece_values(model.plan.budget)
                y, used = exact_feed_forward(ffn, x, None, piece)
            else:
                uses = np.ones((1, len(x)))
                if router is not None:
                    uses = router.weights(router.read_of(x, residual)).T
                used = np.packbits(uses > 0, axis=1)
                y = in_pieces(ffn, x, residual, states.before, model.plan.budget)
            states.add(layer, y)
            nbytes = model.bundle.unit_bytes(number)
            yield Used(used, len(x), nbytes, ffn, x) if inputs else Used(used, len(x), nbytes)
        study.progress(what, len(model.layers), len(model.layers))
