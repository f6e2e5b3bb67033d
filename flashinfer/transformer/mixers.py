"""The kinds of mixers that there are, by their configs."""

from typing import Any

from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.formats.layers.delta_net import DeltaNetConfig
from flashinfer.formats.layers.latent_attention import LatentAttentionConfig
from flashinfer.formats.layers.mamba2 import Mamba2Config
from flashinfer.formats.layers.mixer import MixerConfig
from flashinfer.formats.layers.short_conv import ShortConvConfig
from flashinfer.transformer.attention import Attention
from flashinfer.transformer.delta_net import DeltaNet
from flashinfer.transformer.latent_attention import LatentAttention
from flashinfer.transformer.mamba2 import Mamba2
from flashinfer.transformer.mixer import Mixer, Parts
from flashinfer.transformer.short_conv import ShortConv

# A new kind is a config in formats/layers, a file in this folder, and an entry here.
KINDS: dict[type[MixerConfig], type[Mixer[Any]]] = {
    AttentionConfig: Attention,
    LatentAttentionConfig: LatentAttention,
    ShortConvConfig: ShortConv,
    DeltaNetConfig: DeltaNet,
    Mamba2Config: Mamba2,
}


def kind_of(config: MixerConfig) -> type[Mixer[Any]]:
    """The class of a layer's mixer."""
    return KINDS[type(config)]


def make_mixer(config: MixerConfig, parts: Parts) -> Mixer[Any]:
    """The mixer of a layer."""
    return kind_of(config).made(config, parts)
