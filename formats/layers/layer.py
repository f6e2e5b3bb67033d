"""A layer: a mixer of tokens and a feed-forward network, with norms and sums around them."""

from dataclasses import dataclass

from ..tensors import ATTENTION, TensorSpec, vector
from .altup import AltUpConfig
from .attention import AttentionConfig
from .ffn import FFNConfig
from .mixer import MixerConfig
from .norm import NormConfig
from .per_layer_input import PerLayerInputConfig


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer of a model, which may differ from the others.

    mixer        what mixes the tokens: attention, or what stands in its place
    ffn          without neurons: there is none, and its input is not normalised
    norm         of its blocks
    norm_before  a norm before each block (pre-norm), else after its residual (post-norm)
    norm_after   a norm after each block, too, before it is added
    bare_input   with ``norm_after``: blocks read the hidden state as it is, without a norm before
    parallel     attention and FFN read the same hidden state, and both are added to it
    shared_norm  with ``parallel``: the FFN reads what attention reads
    residual_scale  what a block's output is multiplied with before it is added
    per_layer    a block behind the FFN for what a token gives this layer alone; None: there is none
    output_scale  the layer's output is multiplied with a learned number
    altup        a token has several hidden states, of which the layer computes one; None: one
    laurel_rank  the hidden state is added to attention's sum once more, through two matrices of
                 this rank and a norm, and both are divided by sqrt(2) (LAuReL); 0: it is not
    """

    mixer: MixerConfig
    ffn: FFNConfig
    norm: NormConfig
    norm_before: bool = True
    norm_after: bool = False
    bare_input: bool = False
    parallel: bool = False
    shared_norm: bool = False
    residual_scale: float = 1.0
    per_layer: PerLayerInputConfig | None = None
    output_scale: bool = False
    altup: AltUpConfig | None = None
    laurel_rank: int = 0

    @property
    def attention(self) -> AttentionConfig:
        """The mixer of a layer that has attention."""
        assert isinstance(self.mixer, AttentionConfig), self.mixer.name
        return self.mixer

    def norms(self) -> list[str]:
        """The names of its norms."""
        alone = self.shared_norm or not self.ffn.neurons
        names = ["attention_norm"] if alone else ["attention_norm", "ffn_norm"]
        names = [] if self.bare_input else names
        return names + (["attention_after_norm", "ffn_after_norm"] if self.norm_after else [])

    def tensors(self, name: str) -> list[TensorSpec]:
        """Its TensorSpecs, under names that begin with ``name``."""
        size, specs = self.mixer.hidden_size, []
        for norm in self.norms():
            specs += self.norm.tensors(f"{name}.{norm}", size)
        if self.laurel_rank:
            specs += self.norm.tensors(f"{name}.laurel.norm", size)
            shapes = {"left": (self.laurel_rank, size), "right": (size, self.laurel_rank)}
            specs += [
                TensorSpec(f"{name}.laurel.{part}.weight", shape, ATTENTION)
                for part, shape in shapes.items()
            ]
        if self.altup is not None:
            specs += self.altup.tensors(name)
        if self.output_scale:
            specs.append(vector(f"{name}.output_scale", 1))
        specs += [*self.mixer.tensors(name), *self.ffn.tensors(name)]
        return specs if self.per_layer is None else specs + self.per_layer.tensors(name)
