"""What is said of an architecture's form as GGUF, and how GGUF names and packs tensors."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ...architectures.hugging_face import Rows, behind
from ...architectures.latent_attention import OF_HEADS, TURNED_HEADS
from ...architectures.mixtures import FUSED_ROWS
from ...arrays import AnyArray
from ...bounded_json import JsonObject
from ...layers.layer import LayerConfig
from ..gguf_metadata import Harmless
from .header import Header

RMS, LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
BLOCK, KINDS, PARTS = "blk.{}", ("weight", "bias"), ("gate", "up", "down")
# Our tensor -> GGUF's; {} is the layer.
NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_positions.weight": "position_embd.weight",
    **{f"lm_head.{k}": f"output.{k}" for k in KINDS},
    **{f"final_norm.{k}": f"output_norm.{k}" for k in KINDS},
    **{f"layers.{{}}.attention_norm.{k}": f"{BLOCK}.attn_norm.{k}" for k in KINDS},
    **{f"layers.{{}}.ffn_norm.{k}": f"{BLOCK}.ffn_norm.{k}" for k in KINDS},
    **{f"layers.{{}}.{p}_proj.{k}": f"{BLOCK}.attn_{p}.{k}" for p in "qkv" for k in KINDS},
    **{f"layers.{{}}.o_proj.{k}": f"{BLOCK}.attn_output.{k}" for k in KINDS},
    **{f"layers.{{}}.{p}_norm.{k}": f"{BLOCK}.attn_{p}_norm.{k}" for p in "qk" for k in KINDS},
    **{f"layers.{{}}.ffn.{p}_bias": f"{BLOCK}.ffn_{p}.bias" for p in PARTS},
    "layers.{}.attention_after_norm.weight": f"{BLOCK}.post_attention_norm.weight",
    "layers.{}.ffn_after_norm.weight": f"{BLOCK}.post_ffw_norm.weight",
    **{f"layers.{{}}.router.{k}": f"{BLOCK}.ffn_gate_inp.{k}" for k in KINDS},
    "layers.{}.router.choice_bias": f"{BLOCK}.exp_probs_b.bias",
    "layers.{}.sinks": f"{BLOCK}.attn_sinks.weight",
    "layers.{}.shared.weigh.weight": f"{BLOCK}.ffn_gate_inp_shexp.weight",
    **{f"layers.{{}}.shared.{p}.weight": f"{BLOCK}.ffn_{p}_shexp.weight" for p in PARTS},
}


def _no_fields(header: Header, config: JsonObject) -> JsonObject:
    return {}


@dataclass(frozen=True, kw_only=True)
class GgufForm:
    """How GGUF holds the models of an architecture, where that is not what most of them share.

    architecture  GGUF's name of it
    model_type    Hugging Face's
    activation    of the FFN, that llama.cpp uses for it, under Hugging Face's name
    epsilon       (the config's name of the norms' epsilon, GGUF's)
    ffn           "gated"; "plain": without a gate; "packed": the gate lies before up in one tensor
    windows       0: all layers' attention may have a window; else every so many layers the last one
                  has none; None: a window that a file states has to be without effect
    partly_rotary  only a part of each head may be rotary
    blocks        each mixer and each FFN has a layer's number of its own
    paired        rows of queries and keys are in another order: the two values of a rotary pair are
                  together
    packed_attention  attn_qkv has queries, keys and values; else those of another mixer
    experts       the config's name of how many experts there are
    fields        (header, config) -> the config's fields that only this architecture has, or has
                  otherwise; ``Header.of_layers`` reads metadata that layers have each of their own
    by_layer      the keys in which layers may differ, so that ``fields`` says what follows from it
    names         {our tensor: GGUF's} that differ from NAMES; of several, separated by "|", the
                  first that a file has, else the last
    rows          {our projection: which rows of a packed tensor it is} beside those all have
    stacked       our tensors, {} is the layer, of which those of all layers are one tensor there
    numbered      {our tensor: its number among the matrices of hidden states that lie below each
                  other in one tensor there}
    borrowed      tensors, {} is the layer, for which layers have no use that read the keys and
                  values of an earlier one
    harmless      {metadata key that is not read: whether a value leaves the result unchanged},
                  which goes before ``gguf_metadata.HARMLESS``
    """

    architecture: str
    model_type: str
    activation: str = "silu"
    epsilon: tuple[str, str] = ("rms_norm_eps", RMS)
    ffn: Literal["gated", "plain", "packed"] = "gated"
    windows: int | None = None
    partly_rotary: bool = False
    blocks: bool = False
    paired: bool = False
    packed_attention: bool = True
    experts: str = "num_experts"
    fields: Callable[[Header, JsonObject], JsonObject] = _no_fields
    by_layer: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    stacked: tuple[str, ...] = ()
    borrowed: tuple[str, ...] = ()
    numbered: Mapping[str, int] = field(default_factory=dict)
    harmless: Mapping[str, Harmless] = field(default_factory=dict)

    def naming(self, kinds: Container[str]) -> "Naming":
        """The Naming of a file.

        kinds  what tensors of its layers are called, which tell the forms of an architecture apart
        """
        own = {ours: _there(theirs, kinds) for ours, theirs in self.names.items()}
        names, rows = {**NAMES, **own}, dict(self.rows)
        if self.packed_attention and "attn_qkv.weight" in kinds:
            for p in "qkv":
                names.update({f"layers.{{}}.{p}_proj.{k}": f"{BLOCK}.attn_qkv.{k}" for k in KINDS})
                rows[f"{p}_proj"] = behind(p)
        heads: dict[str, Callable[[LayerConfig], int]] = {}
        if "attn_kv_b.weight" in kinds:
            rows.update(OF_HEADS)
            heads = TURNED_HEADS
        if self.paired:
            rows["q_proj"] = lambda layer: _apart(layer, layer.attention.num_attention_heads)
            rows["k_proj"] = lambda layer: _apart(layer, layer.attention.num_key_value_heads)
        dense = {part: f"{BLOCK}.ffn_{part}.weight" for part in PARTS}
        if self.ffn == "plain":
            del dense["gate"]
        elif self.ffn == "packed":
            dense["gate"] = dense["up"]
            rows["gate"] = lambda layer: np.arange(layer.ffn.d_ffn)
            rows["up"] = lambda layer: np.arange(layer.ffn.d_ffn, 2 * layer.ffn.d_ffn)
        if "ffn_down_t.weight" in kinds:  # PowerInfer's: one row per neuron
            dense["down_t"] = f"{BLOCK}.ffn_down_t.weight"
            del dense["down"]
        experts = dense
        if "ffn_up_exps.weight" in kinds:
            experts = {part: f"{BLOCK}.ffn_{part}_exps.weight" for part in dense}
            for part in PARTS:
                names[f"layers.{{}}.ffn.{part}_bias"] = f"{BLOCK}.ffn_{part}_exps.bias"
        elif "ffn_gate_up_exps.weight" in kinds:
            packed = f"{BLOCK}.ffn_gate_up_exps.weight"
            experts = {"gate": packed, "up": packed, "down": f"{BLOCK}.ffn_down_exps.weight"}
            rows.update(FUSED_ROWS)
        return Naming(
            names, experts, dense, rows, heads, self.blocks, self.stacked, self.borrowed,
            self.numbered,
        )  # fmt: skip


@dataclass(frozen=True)
class Naming:
    """What an architecture's module has by these names, of a GGUF file."""

    NAMES: dict[str, str]
    FFN: dict[str, str]
    DENSE_FFN: dict[str, str]
    ROWS: dict[str, Rows]
    TURNED_HEADS: dict[str, Callable[[LayerConfig], int]] = field(default_factory=dict)
    BLOCKS: bool = False
    STACKED: tuple[str, ...] = ()
    BORROWED: tuple[str, ...] = ()
    NUMBERED: Mapping[str, int] = field(default_factory=dict)


def _there(named: str, kinds: Container[str]) -> str:
    """Of several names of a layer's tensor, separated by "|", the first there is, else the last."""
    names = named.split("|")
    return next((n for n in names if n.removeprefix(f"{BLOCK}.") in kinds), names[-1])


def _apart(layer: LayerConfig, heads: int) -> AnyArray:
    """For each row of Hugging Face's q or k projection, where the values of a rotary pair are half
    a head apart, the row of a GGUF file that holds it."""
    head_dim = layer.attention.head_dim
    ids = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return ids.swapaxes(1, 2).reshape(-1)
