"""A model, put together from its weights by the configs of its layers."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from flashinfer.formats.arrays import UInt8Array
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.layers.ffn import BRANCH_NORMS, FFNConfig
from flashinfer.formats.layers.norm import NormConfig
from flashinfer.formats.number_formats import Matrices
from flashinfer.formats.progress import Progress
from flashinfer.paper.activations_norm import ActivationsNorm
from flashinfer.paper.feedforward import Branches, FeedForward
from flashinfer.paper.flash import Flash, aligned_bytes
from flashinfer.paper.interfaces import Chooser
from flashinfer.paper.neuron_cache import NeuronCache
from flashinfer.paper.neurons import Neurons
from flashinfer.paper.predictor import Predictor
from flashinfer.paper.prefetch import Prefetch
from flashinfer.paper.rounded_down import RoundedDown, TokenScales, room_bytes
from flashinfer.paper.router import RoutedPredictor, Router
from flashinfer.paper.unit_store import UnitStore
from flashinfer.paper.whole_units import WholeUnits
from flashinfer.plan.plan import Plan
from flashinfer.transformer.altup import AltUp, HiddenStates
from flashinfer.transformer.decoder import Decoder
from flashinfer.transformer.encoder import MaskedHead, Pooler
from flashinfer.transformer.laurel import Laurel
from flashinfer.transformer.layer import Layer
from flashinfer.transformer.mixer import Parts
from flashinfer.transformer.mixers import make_mixer
from flashinfer.transformer.norm import Norm
from flashinfer.transformer.per_layer_input import PerLayerInput
from flashinfer.transformer.positions import Positions
from flashinfer.transformer.shared_expert import SharedExpert
from flashinfer.transformer.weights import Linear, Weights


def make_decoder(
    bundle: Bundle, plan: Plan, flash: Flash, weights: dict[str, Any], buffer: UInt8Array
) -> Decoder:
    """The Decoder of a Bundle; the arguments are those of ``make_layers``."""
    config = bundle.config
    decoder = Decoder(
        config,
        make_layers(bundle, plan, flash, weights, buffer),
        embed_tokens=weights["embed_tokens.weight"],
        embed_positions=weights.get("embed_positions.weight"),
        embed_per_layer=weights.get("embed_tokens_per_layer.weight"),
        project_in=weights.get("project_in.weight"),
        project_out=weights.get("project_out.weight"),
        final_norm=make_norm(config.norm, weights, "final_norm") if config.final_norm else None,
        head=weights[config.head_name] if config.has_head else None,
        head_bias=weights.get("lm_head.bias"),
        states=_states(config, weights),
        **_of_encoder(config, weights),
    )
    # An encoder's head is used where logits are asked for, which is seldom.
    chain_streams(decoder.layers, None if config.encoder else decoder.head)
    return decoder


def _states(config: ModelConfig, weights: dict[str, Any]) -> HiddenStates | None:
    """What makes several hidden states of one, and one of them again; None: there is one."""
    if config.hidden_states == 1:
        return None
    into, out = (
        [Linear(weights[f"states.{way}.{i}.weight"]) for i in range(config.hidden_states - 1)]
        for way in ("in", "out")
    )
    return HiddenStates(into, out)


def _of_encoder(config: ModelConfig, weights: dict[str, Any]) -> dict[str, Any]:
    """What the Decoder of an encoder has besides."""
    found: dict[str, Any] = {}
    if config.token_types:
        found["embed_type"] = weights["embed_types.weight"].rows(np.zeros(1, dtype=np.int64))[0]
    if config.embedding_norm:
        found["embed_norm"] = make_norm(config.norm, weights, "embed_norm")
    if config.pooler:
        found["pooler"] = Pooler(Linear(weights["pooler.weight"], weights["pooler.bias"]))
    if config.head_activation is not None:
        dense = Linear(weights["head_dense.weight"], weights["head_dense.bias"])
        norm = make_norm(config.norm, weights, "head_norm")
        found["masked_head"] = MaskedHead(dense, config.head_activation, norm)
    return found


def make_layers(
    bundle: Bundle, plan: Plan, flash: Flash, weights: dict[str, Any], buffer: UInt8Array
) -> list[Layer]:
    """The Layers of a Bundle, with their neuron caches.

    weights  {name: what loading.load_weights gives}; buffer: memory that tiles are streamed through
    """
    config, positions = bundle.config, Positions(plan.context)
    room = np.empty(room_bytes(bundle), dtype=np.uint8)
    layers = []
    for i, neuron_cache in enumerate(_neuron_caches(bundle, plan)):
        described, parts = config.layers[i], Parts(weights, f"layers.{i}", positions)
        block, altup = described.per_layer, described.altup
        layers.append(
            Layer(
                described,
                mixer=make_mixer(described.mixer, parts),
                feed_forward=_feed_forward(
                    bundle, plan, flash, weights, i, neuron_cache, buffer, room
                ),
                **{
                    name: make_norm(described.norm, weights, f"layers.{i}.{name}")
                    for name in described.norms()
                },
                laurel=Laurel.made(described.norm, parts) if described.laurel_rank else None,
                altup=None if altup is None else AltUp.made(altup, parts),
                per_layer=None if block is None else PerLayerInput.made(block, parts),
                output_scale=parts.vector("output_scale"),
            )
        )
    return layers


def make_norm(config: NormConfig, weights: dict[str, Any], name: str) -> Norm:
    return Norm(config, weights.get(f"{name}.weight"), weights.get(f"{name}.bias"))


def _neuron_caches(bundle: Bundle, plan: Plan) -> list[NeuronCache]:
    """The NeuronCache of each layer, all in one memory: their own slots, and then the transit
    slots, which they use in turn."""
    memory, at, caches = aligned_bytes(plan.cache), 0, []
    passing = sum(n * size for n, size in zip(plan.slots, plan.slot_bytes, strict=True))
    for i, layer in enumerate(bundle.config.layers):
        there, size = plan.residence(i, layer.ffn), plan.slot_bytes[i]
        own = slice(at, at + plan.slots[i] * size)
        transit = slice(passing, passing + there.transit * size)
        window = plan.window if there.chosen else None
        caches.append(NeuronCache(there.units, memory, size, plan.policy, window, own, transit))
        at = own.stop
    return caches


def _feed_forward(
    bundle: Bundle,
    plan: Plan,
    flash: Flash,
    weights: dict[str, Any],
    i: int,
    cache: NeuronCache,
    buffer: UInt8Array,
    room: UInt8Array,
) -> FeedForward:
    name, config, shared = f"layers.{i}", bundle.config.layers[i].ffn, None
    if config.shared_d_ffn:
        parts = ("gate", "up", "down", "weigh")
        shared = SharedExpert(config, *[weights.get(f"{name}.shared.{p}.weight") for p in parts])
    branches = None
    if config.branch_norm is not None:
        branches = Branches(
            *(make_norm(config.branch_norm, weights, f"{name}.{norm}") for norm in BRANCH_NORMS)
        )
    neurons = _neurons(bundle, plan, weights, i, room)
    together = 1 if isinstance(neurons, WholeUnits) else config.unit_neurons
    store = UnitStore(bundle.bundles(i), together, cache, flash, buffer)
    predictor = _predictor(bundle, plan, config, weights, name)
    return FeedForward(neurons, store, predictor, Prefetch(plan.prefetch), shared, branches)


def _neurons(
    bundle: Bundle, plan: Plan, weights: dict[str, Any], i: int, room: UInt8Array
) -> Neurons:
    """What a layer's neurons compute; room: see ``room_bytes``."""
    name, config, format = f"layers.{i}", bundle.config.layers[i].ffn, bundle.bundles(i).format
    biases = {p: weights.get(f"{name}.ffn.{p}_bias") for p in ("gate", "up", "down")}
    if config.router and biases["down"] is not None:
        biases["down"] = biases["down"].reshape(config.experts, -1)
    norm = None
    if config.activations_norm is not None:
        weight = weights.get(f"{name}.activations_norm.weight")
        norm = ActivationsNorm(config.activations_norm, weight, config.d_ffn)
    if isinstance(format, Matrices):
        return WholeUnits(config, format, biases, norm)
    cut = bundle.cut(i) if plan.mode == "predicted" else None
    down = RoundedDown(config, format, TokenScales(norm), room) if config.rounded else None
    return Neurons(config, format, biases, cut, norm, down)


def _predictor(
    bundle: Bundle, plan: Plan, config: FFNConfig, weights: dict[str, Any], name: str
) -> Chooser | None:
    """What chooses a layer's units, or None where all are used."""
    router = None
    if config.router and plan.chooses(config):
        names = ("weight", "bias", "choice_bias", "expert_scales")
        weight, *vectors = (weights.get(f"{name}.router.{part}") for part in names)
        router = Router(config.router, weight, *vectors)
        if config.router.norm is not None:
            router.norm = make_norm(config.router.norm, weights, f"{name}.router_norm")
    if plan.mode != "predicted" or not config.neurons:
        return router
    maps: list[Any] = [weights.get(f"{name}.predictor.{p}") for p in ("a", "b", "bias")]
    form = bundle.predictor_form._asdict()
    if router is None:
        return Predictor(*maps, **form)
    return RoutedPredictor(router, config.d_ffn, *maps, **form)


def fill_caches(layers: list[Layer], uses: Sequence[Any] | None, progress: Progress) -> None:
    """Read the FFNs that stay whole now, in large pieces, and the hottest units of the others.

    uses      of each layer how often its units are used, None of a layer whose units are all used
              always; or None: nothing of the others
    progress  called as progress("load", bytes, bytes in all)
    """
    ffns = [layer.feed_forward for layer in layers]
    whole = [ffn for ffn in ffns if ffn.whole.fits]
    warm = [
        (ffn.store, used)
        for ffn, used in zip(ffns, uses or (), strict=bool(uses))
        if used is not None and not ffn.whole.fits
    ]
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


def chain_streams(layers: list[Layer], head: Weights | None) -> None:
    """Tell each part that streams at every token which tensor comes after it."""
    streams = [stream for layer in layers for stream in layer.streams()]
    streams += head.streams() if head is not None else ()
    for stream, after in itertools.pairwise(streams):
        stream.following = after.tensor
