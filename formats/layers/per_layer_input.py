"""A block that each layer has for what a token gives it alone (Gemma 3n): its tensors."""

from dataclasses import dataclass

from ..errors import FormatError
from ..tensors import ATTENTION, TensorSpec
from .ffn import ACTIVATIONS
from .mixer import check_widths
from .norm import NormConfig


@dataclass(frozen=True, kw_only=True)
class PerLayerInputConfig:
    """Of one layer: norm(proj(activation(gate h) * e)) is added to h, the hidden state behind its
    FFN. e is the token's own: (context_norm(context h0 / sqrt(hidden_size)) + a part of its row of
    ``embed_tokens_per_layer`` times sqrt(size)) / sqrt(2), where h0 is the token's embedding.

    size   of e
    begin  of the layer's part of the row
    """

    hidden_size: int
    size: int
    begin: int
    activation: str
    norm: NormConfig

    def __post_init__(self) -> None:
        check_widths(per_layer_input=self.size)
        if self.activation not in ACTIVATIONS:
            raise FormatError(f"config: activation {self.activation!r} is not supported")

    def shapes(self) -> dict[str, tuple[int, int]]:
        """{"context", "gate", "proj": (rows, columns)}, in the order in which they are used."""
        d, size = self.hidden_size, self.size
        return {"context": (size, d), "gate": (size, d), "proj": (d, size)}

    def tensors(self, name: str) -> list[TensorSpec]:
        """Its TensorSpecs, under names that begin with the layer's ``name``."""
        return [
            *self.norm.tensors(f"{name}.per_layer.context_norm", self.size),
            *self.norm.tensors(f"{name}.per_layer.after_norm", self.hidden_size),
            *(
                TensorSpec(f"{name}.per_layer.{part}.weight", shape, ATTENTION)
                for part, shape in self.shapes().items()
            ),
        ]
