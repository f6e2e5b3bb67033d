"""What mixes the tokens of a text in a layer, whatever its kind."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ..errors import FormatError
from ..tensors import TensorSpec
from .rotary import Rotary

WIDEST = 1 << 20  # no honest hidden size, and no heads together, are wider


@dataclass(frozen=True, kw_only=True)
class MixerConfig(ABC):
    """Of one layer: attention, or what stands in its place. Each kind is a file of this folder, and
    has its computation in flashinfer/transformer/mixers.py's table.

    name       of the kind, for people
    rotary     queries and keys are turned so; None: they are not
    both_ways  each token sees those after it, too, as an encoder's do
    memory_of  the earlier layer whose memory of a text it reads, and that it keeps none of its own
               for; None: it has its own
    """

    name: ClassVar[str]
    hidden_size: int
    rotary: Rotary | None = None
    both_ways: bool = False
    memory_of: int | None = None

    def described(self) -> str:
        """What it is, in a few words."""
        return self.name

    @abstractmethod
    def tensors(self, name: str) -> list[TensorSpec]:
        """Its TensorSpecs, under names that begin with the layer's ``name``."""


def check_widths(**widths: int) -> None:
    """Raises FormatError where a mixer is wider than that of any model."""
    for name, width in widths.items():
        if width > WIDEST:
            what = name.replace("_", " ")
            raise FormatError(f"config: a {what} of {width} is not that of a model")
