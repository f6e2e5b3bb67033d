"""What llama.cpp's conversion writes of layers without attention: metadata, and tensors changed."""

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float32Array
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.formats.layers.delta_net import DeltaNetConfig
from flashinfer.formats.layers.short_conv import ShortConvConfig
from flashinfer.oracle.kits.gguf_file import Metadata
from flashinfer.oracle.kits.weights import Tensors

TILED = ("qwen35", "qwen35moe")  # whose heads of values that share a head of keys lie apart


def metadata_of_mixers(config: ModelConfig) -> Metadata:
    """The metadata of short convolutions and gated delta nets."""
    found: dict[str, bool | int | float | str | list[int]] = {}
    for layer in config.layers:
        mixer = layer.mixer
        if isinstance(mixer, ShortConvConfig):
            found["shortconv.l_cache"] = mixer.kernel
            found["attention.head_count_kv"] = [
                k.mixer.num_key_value_heads if isinstance(k.mixer, AttentionConfig) else 0
                for k in config.layers
            ]
        if isinstance(mixer, DeltaNetConfig):
            found |= {
                "ssm.conv_kernel": mixer.kernel,
                "ssm.inner_size": mixer.value_heads * mixer.value_dim,
                "ssm.state_size": mixer.key_dim,
                "ssm.time_step_rank": mixer.value_heads,
                "ssm.group_count": mixer.key_heads,
                "full_attention_interval": 4,
                "rope.dimension_sections": [1, 1, 0, 0],
            }
    return found


def as_converted(architecture: str, tensors: Tensors, config: ModelConfig) -> Tensors:
    """The tensors of a checkpoint, as llama.cpp's conversion changes them."""
    nets = [k.mixer for k in config.layers if isinstance(k.mixer, DeltaNetConfig)]
    if architecture not in TILED or not nets:
        return tensors
    return {name: _tiled(name, values, nets[0]) for name, values in tensors.items()}


def _tiled(name: str, values: Float32Array, net: DeltaNetConfig) -> Float32Array:
    """A tensor whose heads of values are in another order: the first of each head of keys, then the
    second of each."""
    heads = np.arange(net.value_heads).reshape(net.key_heads, -1).T.reshape(-1)
    size, keys = net.value_dim, 2 * net.key_heads * net.key_dim
    within: AnyArray = (heads[:, None] * size + np.arange(size)).reshape(-1)
    kind = name.split(".", 2)[-1]
    if kind in ("attn_qkv.weight", "ssm_conv1d.weight"):
        return np.concatenate([values[:keys], values[keys:][within]])
    if kind == "attn_gate.weight":
        return values[within]
    if kind in ("ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias"):
        return values[heads]
    return values[:, within] if kind == "ssm_out.weight" else values
