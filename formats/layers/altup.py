"""Several hidden states of a token, of which each layer computes one (AltUp): its tensors."""

from dataclasses import dataclass

from ..errors import FormatError
from ..tensors import SMALL, TensorSpec, vector
from .norm import NormConfig

MOST_STATES = 64  # no honest model has more


@dataclass(frozen=True, kw_only=True)
class AltUpConfig:
    """Alternating updates of one layer (Baykal et al. 2023). The layer predicts all hidden states
    from those that the layer before gave, computes the ``active`` one of its prediction, and
    corrects the others by what that became. What its block for the token's own gives is added to
    all but the first.

    states         of a token, each hidden_size wide
    correct_scale  what the block for the token's own reads is multiplied with learned numbers
    """

    hidden_size: int
    states: int
    active: int
    correct_scale: bool
    norm: NormConfig

    def __post_init__(self) -> None:
        if not 1 < self.states <= MOST_STATES or not 0 <= self.active < self.states:
            raise FormatError(
                f"config: the hidden state {self.active} of {self.states} is not that of a model; "
                f"2 to {MOST_STATES} are supported"
            )

    def tensors(self, name: str) -> list[TensorSpec]:
        """Its TensorSpecs, under names that begin with the layer's ``name``."""
        n, d = self.states, self.hidden_size
        specs = self.norm.tensors(f"{name}.altup.norm", d)
        specs.append(vector(f"{name}.altup.correct_scale", d))  # also where it is not used
        shapes = {"router": (n, d), "predict": (n * n, n), "correct": (n, n)}
        return specs + [
            TensorSpec(f"{name}.altup.{part}.weight", shape, SMALL, exact=True)
            for part, shape in shapes.items()
        ]
