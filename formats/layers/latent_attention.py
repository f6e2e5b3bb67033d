"""Latent attention (DeepSeek V2, "MLA"): of each token a small vector is kept, which all heads
share, in the place of keys and values of each head."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import FormatError
from ..tensors import ATTENTION, TensorSpec, vector
from .attention import AttentionConfig
from .mixer import MixerConfig, check_widths
from .norm import NormConfig


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig(MixerConfig):
    """Of one layer. kv_a(x) = [latent | k_rope]; a head's key is [k_b latent | k_rope] and its
    value v_b latent, where the latent is normalised and k_rope is turned. Dimensions keep Hugging
    Face's names.

    kv_lora_rank      width of the latent
    q_lora_rank       queries are q_b(norm(q_a(x))), and this wide between both; None: they are q(x)
    qk_nope_head_dim, qk_rope_head_dim  values of each query and key that are not turned, and that
                      are; v_head_dim: of each value
    latent_norm       of the latent, and of what q_a gives
    attention_bias    q_a, kv_a and o have biases
    yarn_weight, yarn_factor  scores are multiplied with qk_head_dim^-1/2, and with the square of
                      0.1 yarn_weight log(yarn_factor) + 1 where the factor is above 1
    interleaved       rows of the source's matrices have both values of a rotary pair side by side
    """

    name: ClassVar[str] = "latent attention"
    num_attention_heads: int
    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    latent_norm: NormConfig
    attention_bias: bool = False
    yarn_weight: float = 0.0
    yarn_factor: float = 1.0
    interleaved: bool = True

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        check_widths(
            hidden_size=self.hidden_size,
            width_of_all_queries=heads * (self.kv_lora_rank + self.qk_rope_head_dim),
            width_of_all_keys=heads * self.qk_head_dim,
            width_of_all_values=heads * self.v_head_dim,
            q_lora_rank=self.q_lora_rank or 0,
        )
        if self.rotary is None or self.rotary.dim != self.qk_rope_head_dim:
            turned = 0 if self.rotary is None else self.rotary.dim
            raise FormatError(
                f"config: {turned} of qk_rope_head_dim {self.qk_rope_head_dim} values are turned; "
                "all of them have to be"
            )

    @property
    def qk_head_dim(self) -> int:
        """Values of each head's query, and of its key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cached_dim(self) -> int:
        """Values that are kept of each token: its latent, and what is turned of its keys."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def over_latents(self) -> AttentionConfig:
        """The same as attention whose heads share one key, which is what is kept of a token: their
        queries have k_b in them."""
        return AttentionConfig(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=1,
            head_dim=self.cached_dim,
            norm=self.latent_norm,
        )

    def described(self) -> str:
        """What it is, in a few words."""
        return f"{self.num_attention_heads} heads of latent attention"

    def projections(self) -> dict[str, tuple[int, int]]:
        """{our name of a matrix: (rows, columns)}, in the order in which they are used."""
        d, heads, rank = self.hidden_size, self.num_attention_heads, self.q_lora_rank
        queries = heads * self.qk_head_dim
        of_queries = (
            {"q_proj": (queries, d)}
            if rank is None
            else {"q_a_proj": (rank, d), "q_b_proj": (queries, rank)}
        )
        return {
            **of_queries,
            "kv_a_proj": (self.cached_dim, d),
            "k_b_proj": (heads * self.kv_lora_rank, self.qk_nope_head_dim),
            "v_b_proj": (heads * self.v_head_dim, self.kv_lora_rank),
            "o_proj": (d, heads * self.v_head_dim),
        }

    def tensors(self, name: str) -> list[TensorSpec]:
        """Its TensorSpecs, under names that begin with the layer's ``name``."""
        shapes, specs = self.projections(), []
        if self.q_lora_rank is not None:
            specs += self.latent_norm.tensors(f"{name}.q_a_norm", self.q_lora_rank)
        specs += self.latent_norm.tensors(f"{name}.kv_a_norm", self.kv_lora_rank)
        biased = ("q_a_proj", "kv_a_proj", "o_proj") if self.attention_bias else ()
        specs += [vector(f"{name}.{p}.bias", shapes[p][0]) for p in biased if p in shapes]
        specs += [TensorSpec(f"{name}.{p}.weight", shape, ATTENTION) for p, shape in shapes.items()]
        return specs
