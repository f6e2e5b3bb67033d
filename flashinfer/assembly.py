"""A model's layers, put together from its weights by its options."""

import itertools
from typing import Any

import numpy as np

from flashinfer.formats.arrays import UInt8Array
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.progress import Progress
from flashinfer.loading import allocate_kv_caches
from flashinfer.paper.feedforward import FeedForward
from flashinfer.paper.flash import Flash, aligned_bytes
from flashinfer.paper.interfaces import Chooser
from flashinfer.paper.neuron_cache import NeuronCache
from flashinfer.paper.neurons import Neurons
from flashinfer.paper.predictor import Predictor
from flashinfer.paper.prefetch import Prefetch
from flashinfer.paper.router import RoutedPredictor, Router
from flashinfer.paper.unit_store import UnitStore
from flashinfer.plan.plan import Plan
from flashinfer.transformer.attention import Attention
from flashinfer.transformer.kv_cache import KeyValueCache
from flashinfer.transformer.layer import Layer
from flashinfer.transformer.norm import Norm
from flashinfer.transformer.positions import RotaryPositions, alibi_table
from flashinfer.transformer.shared_expert import SharedExpert
from flashinfer.transformer.weights import Weights


def make_layers(
    bundle: Bundle,
    plan: Plan,
    flash: Flash,
    weights: dict[str, Any],
    buffer: UInt8Array,
    stride: int,
) -> list[Layer]:
    """The Layers of a Bundle, with their caches and a key/value cache.

    weights  {name: what loading.load_weights gives}; buffer: memory that tiles are streamed through
    stride   bytes of a row of the neuron caches
    """
    config, neurons = bundle.config, aligned_bytes(plan.cache)
    begins = np.cumsum([0, *plan.cache_rows]) * stride
    shared = neurons[begins[-1] :] if plan.shared_rows else None
    positions = _Positions(config, plan.context)
    layers = []
    for i, kv_cache in enumerate(allocate_kv_caches(bundle, plan)):
        attention = _attention(config, weights, i, kv_cache, positions)
        own = neurons[begins[i] : begins[i + 1]]
        borrowed = shared is not None and not len(own)
        cache = NeuronCache(
            config.units, shared if borrowed else own, stride, plan.policy, plan.window, borrowed
        )
        feed_forward = _feed_forward(bundle, plan, flash, weights, i, cache, buffer)
        norms = {
            name: make_norm(config, weights, f"layers.{i}.{name}")
            for name, there in (
                ("attention_norm", True), ("ffn_norm", not config.shared_norm),
                ("attention_after_norm", config.norm_after),
                ("ffn_after_norm", config.norm_after),
            )
            if there
        }  # fmt: skip
        layers.append(Layer(config, attention=attention, feed_forward=feed_forward, **norms))
    return layers


def make_norm(config: ModelConfig, weights: dict[str, Any], name: str) -> Norm:
    return Norm(
        config.norm,
        config.norm_epsilon,
        weights.get(f"{name}.weight"),
        weights.get(f"{name}.bias"),
    )


class _Positions:
    """What all layers' attention shares."""

    def __init__(self, config: ModelConfig, context: int) -> None:
        self.rotary = self.rotary_near = self.score_bias = None
        if config.positions == "rotary":
            self.rotary = self.rotary_near = RotaryPositions(config.rotary, context)
            if config.rotary_near:
                self.rotary_near = RotaryPositions(config.rotary_near, context)
        elif config.positions == "alibi":
            self.score_bias = alibi_table(config.num_attention_heads, config.head_dim, context)


def _attention(
    config: ModelConfig,
    weights: dict[str, Any],
    i: int,
    kv_cache: KeyValueCache,
    positions: _Positions,
) -> Attention:
    name = f"layers.{i}"
    norms = {
        p: make_norm(config, weights, f"{name}.{p}_norm") if config.qk_norm else None for p in "qk"
    }
    q, k, v, o = (weights[f"{name}.{p}_proj.weight"] for p in "qkvo")
    return Attention(
        config,
        q,
        k,
        v,
        o,
        {p: weights.get(f"{name}.{p}_proj.bias") for p in "qkvo"},
        norms,
        kv_cache,
        positions.rotary_near if kv_cache.window else positions.rotary,
        positions.score_bias,
        weights.get(f"{name}.sinks"),
    )


def _feed_forward(
    bundle: Bundle,
    plan: Plan,
    flash: Flash,
    weights: dict[str, Any],
    i: int,
    cache: NeuronCache,
    buffer: UInt8Array,
) -> FeedForward:
    name, config, shared = f"layers.{i}", bundle.config, None
    if config.shared_d_ffn:
        parts = ("gate", "up", "down", "weigh")
        shared = SharedExpert(config, *[weights.get(f"{name}.shared.{p}.weight") for p in parts])
    biases = {p: weights.get(f"{name}.ffn.{p}_bias") for p in ("gate", "up", "down")}
    if config.experts and biases["down"] is not None:
        biases["down"] = biases["down"].reshape(config.experts, -1)
    bundles = bundle.tensors[f"{name}.ffn.bundles"]
    cut = bundle.cut(i) if plan.neurons == "predicted" else None
    neurons = Neurons(config, bundles.format, biases, cut)
    predictor = _predictor(bundle, plan, weights, name)
    store = UnitStore(bundles, config.unit_neurons, cache, flash, buffer)
    return FeedForward(neurons, store, predictor, Prefetch(plan.ahead), shared)


def _predictor(bundle: Bundle, plan: Plan, weights: dict[str, Any], name: str) -> Chooser | None:
    """What chooses a layer's units, or None where all are used."""
    config, form = bundle.config, bundle.predictor_form._asdict()
    parts: list[Any] = [weights.get(f"{name}.predictor.{p}") for p in ("a", "b", "bias")]
    predicted = plan.neurons == "predicted"
    if not config.experts:
        return Predictor(*parts, **form) if predicted else None
    router = Router(
        weights[f"{name}.router.weight"],
        weights.get(f"{name}.router.bias"),
        config.experts_per_token,
        config.router_normalised,
    )
    neurons = config.d_ffn // config.experts
    return RoutedPredictor(router, neurons, *parts, **form) if predicted else router


def fill_caches(layers: list[Layer], uses: list[Any] | None, progress: Progress) -> None:
    """Read the FFNs that stay whole now, in large pieces, and the hottest units of the others.

    uses      of each layer how often its units are used, or None: nothing of the others
    progress  called as progress("load", bytes, bytes in all)
    """
    ffns = [layer.feed_forward for layer in layers]
    whole = [ffn for ffn in ffns if ffn.whole.fits]
    pairs = zip(ffns, uses or (), strict=bool(uses))
    warm = [
        (ffn.store, used) for ffn, used in pairs
        if not (ffn.whole.fits or ffn.store.cache.borrowed)
    ]  # fmt: skip
    total, done = sum(ffn.store.bundles.nbytes for ffn in whole), 0
    total += sum(len(store.hottest(used)) * store.units.row_bytes for store, used in warm)

    def more(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("load", done, total)

    for ffn in whole:
        ffn.whole.fill(more)
    for store, used in warm:
        store.warm(used, more)


def chain_streams(layers: list[Layer], head: Weights) -> None:
    """Tell each part that streams at every token which tensor comes after it."""
    streams = [stream for layer in layers for stream in layer.streams()]
    for stream, after in itertools.pairwise((*streams, *head.streams())):
        stream.following = after.tensor
