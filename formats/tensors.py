"""What a bundle says of each tensor that it holds: its name, its shape, and what it is for."""

from dataclasses import dataclass
from typing import Literal, get_args

# What a tensor is to the memory plan; their order is the order on flash.
#   small      norms, biases, projections, routers: always in DRAM
#   predictor  always in DRAM, or streamed where the budget is very small
#   attention  and shared experts: in DRAM where they fit, else streamed layer by layer
#   head       in DRAM where it fits, else streamed
#   embedding  read row by row, where the output head does not hold it already
#   ffn        read unit by unit
Role = Literal["small", "predictor", "attention", "head", "embedding", "ffn"]
ROLES: tuple[Role, ...] = get_args(Role)
SMALL, PREDICTOR, ATTENTION, HEAD, EMBEDDING, FFN = ROLES


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name in the bundle, shape and role; ``exact`` ones are always f32."""

    name: str
    shape: tuple[int, ...]
    role: Role
    exact: bool = False

    @property
    def layer(self) -> int | None:
        """The layer that it belongs to; None: the whole model."""
        first, *others = self.name.split(".")
        return int(others[0]) if first == "layers" else None


def vector(name: str, size: int) -> TensorSpec:
    """The TensorSpec of a bias, or of a norm's weights: (size,) float32, always in DRAM."""
    return TensorSpec(name, (size,), SMALL, exact=True)
