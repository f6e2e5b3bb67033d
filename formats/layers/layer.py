"""A layer: attention and feed-forward, and how norms and sums stand around them."""

from dataclasses import dataclass

from ..tensors import TensorSpec
from .attention import AttentionConfig
from .ffn import FFNConfig
from .norm import NormConfig


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer of a model, which may differ from the others.

    norm         of its blocks
    norm_before  a norm before each block (pre-norm), else after its residual (post-norm)
    norm_after   a norm after each block, too, before it is added
    parallel     attention and FFN read the same hidden state, and both are added to it
    shared_norm  with ``parallel``: the FFN reads what attention reads
    residual_scale  what a block's output is multiplied with before it is added
    """

    attention: AttentionConfig
    ffn: FFNConfig
    norm: NormConfig
    norm_before: bool = True
    norm_after: bool = False
    parallel: bool = False
    shared_norm: bool = False
    residual_scale: float = 1.0

    def norms(self) -> list[str]:
        """The names of its norms."""
        names = ["attention_norm"] if self.shared_norm else ["attention_norm", "ffn_norm"]
        return names + (["attention_after_norm", "ffn_after_norm"] if self.norm_after else [])

    def tensors(self, name: str) -> list[TensorSpec]:
        """Its TensorSpecs, under names that begin with ``name``."""
        size, specs = self.attention.hidden_size, []
        for norm in self.norms():
            specs += self.norm.tensors(f"{name}.{norm}", size)
        return [*specs, *self.attention.tensors(name), *self.ffn.tensors(name)]
