"""Latent attention in float64: its parts, each with its noise."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from flashinfer.formats.arrays import Float64Array
from flashinfer.formats.layers.latent_attention import LatentAttentionConfig
from flashinfer.oracle import attending, known
from flashinfer.oracle.arithmetic import Arithmetic
from flashinfer.oracle.known import Known
from flashinfer.transformer.latent_attention import score_scale


class OfHeads(NamedTuple):
    """A matrix of each head, and their number format: k_b is transposed."""

    matrix: Float64Array
    format: str


def of_heads(weights: Any, layer: int, part: str) -> OfHeads:
    """k_b or v_b of a layer; weights: ModelWeights."""
    name = f"layers.{layer}.{part}_b_proj.weight"
    return OfHeads(weights[name], weights.format(name))


def cut(x: Known, begin: int, end: int | None = None) -> Known:
    """Some of the last axis."""
    noise = None if x.noise is None else x.noise[..., begin:end]
    return Known(x.value[..., begin:end], noise)


def beside(first: Known, second: Known) -> Known:
    """Two along the last axis."""
    value = np.concatenate([first.value, second.value], axis=-1)
    return Known(value, np.concatenate([first.spread, second.spread], axis=-1))


def turned_part(config: LatentAttentionConfig, x: Known, part: str) -> Known:
    """What is turned: of queries, x (T, heads * qk_head_dim), or of what kv_a gives, x (T,
    kv_lora_rank + qk_rope_head_dim) -> (T, heads or 1, qk_rope_head_dim)."""
    heads, rope = config.num_attention_heads if part == "q" else 1, config.qk_rope_head_dim
    return cut(x.reshape(len(x.value), heads, -1), -rope)


def with_keys(
    config: LatentAttentionConfig, q: Known, q_turned: Known, k_b: OfHeads, how: Arithmetic
) -> Known:
    """Queries that meet latents: q (T, heads * qk_head_dim), q_turned (T, heads, qk_rope_head_dim)
    -> (T, heads, kv_lora_rank + qk_rope_head_dim)."""
    q = q.reshape(len(q.value), config.num_attention_heads, -1)
    return beside(_by_head(cut(q, 0, config.qk_nope_head_dim), k_b, how), q_turned)


def attend(
    config: LatentAttentionConfig, q: Known, rows: Known, v_b: OfHeads, how: Arithmetic
) -> attending.Attended:
    """q (T, heads, n), rows (T, 1, n) of all tokens, which are keys and values."""
    shared = replace(config.over_latents, attention_scale=score_scale(config))
    found = attending.attend(shared, q, rows, rows, None, how)
    sums = found.heads.reshape(len(q.value), config.num_attention_heads, -1)
    heads = _by_head(cut(sums, 0, config.kv_lora_rank), v_b, how)
    return attending.Attended(found.scores_max, heads.reshape(len(q.value), -1))


def _by_head(x: Known, of_heads: OfHeads, how: Arithmetic) -> Known:
    """x (T, heads, columns) times each head's own matrix -> (T, heads, rows)."""
    heads = x.value.shape[1]
    found = [
        known.linear(
            Known(x.value[:, head], None if x.noise is None else x.noise[:, head]), matrix, None,
            of_heads.format, how,
        )
        for head, matrix in enumerate(np.split(of_heads.matrix, heads))
    ]  # fmt: skip
    value = np.stack([one.value for one in found], axis=1)
    return Known(value, np.stack([one.spread for one in found], axis=1))
