"""Softmax attention: its sizes and options, and its tensors."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import FormatError
from ..tensors import ATTENTION, TensorSpec, vector
from .mixer import WIDEST, MixerConfig
from .norm import NormConfig

# Of c tanh(x / c): tanh is computed to some 2^-23, so that a larger c leaves no exact digits.
LEAST_CAP, MOST_CAP = 1e-3, 1e3


@dataclass(frozen=True)
class Temperature:
    """Queries of far positions are multiplied with 1 + beta log(1 + floor(position / length)), so
    that scores stay apart in long texts (Llama 4)."""

    beta: float
    length: int


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Of one layer. Dimensions keep Hugging Face's names.

    temperature       queries grow with their position so; None: they do not
    alibi             scores fall with the distance instead (Press et al. 2021)
    attention_window  tokens that each token sees, itself included; None: all
    qkv_bias, o_bias  these projections have biases
    rounded           what its projections read is rounded to 8 bits, with one scale for each token
                      (BitNet b1.58)
    qk_norm           queries and keys are normalised before they are turned: each "head" by
                      itself, or "all" heads together; None: not
    qk_norm_after_rotary  they are normalised when they are turned already
    heads_norm        the heads' sums of values are normalised, all together, before the last
                      projection
    v_norm            values are normalised, each head by itself, without weights
    v_of_k            values are what the keys' projection gives, before keys are normalised
    lends             later layers read its keys and values, too (their ``memory_of``)
    norm              how
    attention_scale   what scores are multiplied with; None: head_dim^-1/2
    output_gate       what heads give is multiplied with sigmoid(g(x)) before it is projected
    attention_sinks   each head has a learned extra softmax logit
    score_cap         scores become c tanh(score / c); None: they stay
    """

    name: ClassVar[str] = "attention"
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    temperature: Temperature | None = None
    alibi: bool = False
    attention_window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    rounded: bool = False
    qk_norm: Literal["head", "all"] | None = None
    qk_norm_after_rotary: bool = False
    heads_norm: bool = False
    v_norm: bool = False
    v_of_k: bool = False
    lends: bool = False
    norm: NormConfig
    attention_scale: float | None = None
    output_gate: bool = False
    attention_sinks: bool = False
    score_cap: float | None = None

    def __post_init__(self) -> None:
        width = self.num_attention_heads * self.head_dim
        if max(width, self.hidden_size) > WIDEST:
            raise FormatError(
                f"config: a hidden size of {self.hidden_size} and heads of {width} together are "
                "not those of a model"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise FormatError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        check_cap("attention", self.score_cap)
        if self.both_ways and (self.attention_window is not None or self.alibi):
            raise FormatError("config: attention both ways has no window and no alibi here")
        rotary = self.rotary
        if rotary and (rotary.dim % 2 or not 0 < rotary.dim <= self.head_dim):
            raise FormatError(
                f"config: {rotary.dim} values of each head of {self.head_dim} cannot be rotary"
            )

    def described(self) -> str:
        """What it is, in a few words."""
        return f"{self.num_attention_heads} heads"

    def projections(self) -> dict[str, tuple[int, int]]:
        """{"q", "k", "v", "o": (rows, columns)}, and "g" where there is an output gate; without
        "k" and "v" where they are another layer's, or "v" where it is made of keys."""
        d, width = self.hidden_size, self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        own = "" if self.memory_of is not None else "k" if self.v_of_k else "kv"
        gate = {"g": (width, d)} if self.output_gate else {}
        return {"q": (width, d), **dict.fromkeys(own, (keys, d)), **gate, "o": (d, width)}

    @property
    def normed(self) -> str:
        """Of queries and keys those that it normalises with weights: "qk", "q" or none."""
        return "" if self.qk_norm is None else "q" if self.memory_of is not None else "qk"

    def tensors(self, name: str) -> list[TensorSpec]:
        """Its TensorSpecs, under names that begin with the layer's ``name``."""
        shapes, specs = self.projections(), []
        if self.qk_norm:
            for p in self.normed:
                size = shapes[p][0] if self.qk_norm == "all" else self.head_dim
                specs += self.norm.tensors(f"{name}.{p}_norm", size)
        if self.heads_norm:
            specs += self.norm.tensors(f"{name}.heads_norm", shapes["o"][1])
        biased = ("qkv" if self.qkv_bias else "") + ("o" if self.o_bias else "")
        if self.qkv_bias and self.output_gate:
            biased += "g"
        specs += [vector(f"{name}.{p}_proj.bias", shapes[p][0]) for p in biased if p in shapes]
        if self.attention_sinks:
            specs.append(vector(f"{name}.sinks", self.num_attention_heads))
        specs += [
            TensorSpec(f"{name}.{p}_proj.weight", shape, ATTENTION) for p, shape in shapes.items()
        ]
        return specs


def check_cap(what: str, cap: float | None) -> None:
    """Raises FormatError where a soft cap leaves no exact digits."""
    if cap is not None and not LEAST_CAP <= cap <= MOST_CAP:
        raise FormatError(
            f"config: the {what} soft cap {cap} is not within {LEAST_CAP} to {MOST_CAP}"
        )
