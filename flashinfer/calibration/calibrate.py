"""Finding out which neurons fire: run a text densely, make predictors, write them down."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from flashinfer import kernels
from flashinfer.calibration.firing import (
    PIECE_BYTES,
    FindCut,
    Layer,
    Predict,
    firing,
    path_bytes,
    piece_values,
)
from flashinfer.calibration.predictor_import import imported
from flashinfer.calibration.predictor_training import (
    Choice,
    Found,
    Observations,
    UpTiles,
    count,
    find_predictor,
)
from flashinfer.calibration.routing import routing, tokens_that_fit
from flashinfer.calibration.text_states import TextStates, state_numbers
from flashinfer.formats.arrays import AnyArray, Float32Array
from flashinfer.formats.bundle.calibration import (
    POWERINFER,
    TRAINED,
    Calibration,
    Cut,
    Method,
    Sparsity,
)
from flashinfer.formats.bundle.in_place import refuse_apart
from flashinfer.formats.bundle.layout import format_of, layout, predictor_layout
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.bundle.writer import laid_out, new_tensor, stored_tensors, write_bundle
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.errors import BudgetError, UserError
from flashinfer.formats.files import refuse_loss, refuse_target
from flashinfer.formats.numbers import LARGEST_FLOAT32, is_number
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.model import Model
from flashinfer.paper.feedforward import FeedForward
from flashinfer.plan import memory
from flashinfer.plan.companion import bundle_at

SEQUENCE = 256  # tokens that attend to each other
LEAST_TOKENS = 512
OTHERS = 4  # one token in so many may be of another text
SAMPLE = 128  # tokens that thresholds are found on

# In which order a layer's neurons lie in the file: that of their numbers, which training gave them,
# or each beside those that it fires with.
LayoutName = Literal["trained", "coactivation"]
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)


def calibrate(
    path: Path | str,
    token_ids: Sequence[int] | AnyArray,
    destination: Path | str | None = None,
    text: str = "",
    tokens: int = 8192,
    missed: float = 0.05,
    steps: int = 300,
    memory_budget: int | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
    target_sparsity: float | None = None,
    method: Method = "cats",
    predictor: Choice | Literal["none"] = "better",
    predictor_from: Path | str | None = None,
    others: Sequence[int] | AnyArray = (),
    layout: LayoutName = "trained",
) -> Calibration:
    """Calibrate the bundle at ``path`` on a text; return what was found, which the bundle holds.

    token_ids    the text; its first ``tokens`` are used, fewer where the memory is too little
    destination  the bundle to write; None: replace the one at ``path``
    text         the text's name, for the record
    missed       share of the active neurons that a predictor may miss on held-out text
    steps        of training after the SVD
    progress     is told the layers done, in fractions, as "calibrate"
    predictor    "svd", "trained", or the "better" of the two; "none", for a mixture of experts
                 with a ReLU: only which experts are used, as of other mixtures
    predictor_from  predictors of PowerInfer's to be taken as they are: see predictor_import
    others       tokens of texts of other kinds, such as ``text.own_texts.of_other_kinds`` gives: up
                 to a quarter of ``tokens`` are taken of them, so that a predictor names what fires
                 on unfamiliar text, too; what is written down is of the text itself
    target_sparsity  share of a layer's neurons to take as silent where the activation leaves none
                 so; in force where ``neurons="predicted"`` is asked for, and not exact
    method       which: those whose gate, before its activation, is least ("threshold"); whose
                 gate, after it, is smallest ("cats", Lee et al. 2024); whose contribution to the
                 down projection is ("teal", Liu et al. 2024, there for each input of a product)
    layout       "coactivation": neurons lie beside those that they fire with, so that one read
                 brings several; no bit of a result changes

    Raises UserError where the text is too short, the result could not be written, or the model
    gives states that are not finite.
    """
    path = bundle_at(path)
    budget = memory.default_budget() if memory_budget is None else memory_budget
    room = memory.header_room(budget)
    with Bundle(path, calibrated=False, memory=room) as bundle:
        config = bundle.config
        config.refuse_encoder(path)
        # Experts with a ReLU have silent neurons, too, unless their matrices are kept whole; no
        # model is known that has biases as well.
        whole = any(layer.ffn.ffn_bias or layer.ffn.matrices for layer in config.layers)
        apart = config.sparse and not whole and predictor != "none"
        routes = config.mixture and not apart
        _check(bundle, target_sparsity, predictor_from)
        _check_layout(bundle, layout)
        _check_destination(destination or path, bundle, predictor_from)
        with_others = not (routes or target_sparsity or predictor_from)
        further = min(len(others), len(token_ids) // (OTHERS - 1)) if with_others else 0
        room_for_path = 0 if layout == "trained" else path_bytes(config)
        tokens, sequence = _length(
            config, tokens, len(token_ids), further, budget - 3 * room_for_path, routes
        )
    with _opened(path, budget, sequence, threads) as model:
        further = min(further, tokens // OTHERS) // sequence * sequence
        ids = np.concatenate([others[:further], token_ids[: tokens - further]]).astype(np.int64)
        states = TextStates(model, ids, sequence)
        # "none" is for a mixture; a model without experts has no use for it.
        kind: Choice = predictor if predictor != "none" else "better"
        predict: Predict = partial(_own_predictor, missed=missed, steps=steps, kind=kind)
        if predictor_from is not None:
            predict = partial(_imported, model.bundle, predictor_from)
        find_cut: FindCut | None = None
        if target_sparsity:
            find_cut = partial(_cut, method=method, target=target_sparsity)
        found: Iterable[Layer]
        if routes:
            found = (Layer(None, record) for record in routing(states, progress, budget))
        else:
            residual, together = predictor_from is not None, layout == "coactivation"
            found = firing(states, predict, residual, find_cut, progress, further, together)
        layers = _all(found, states, path)
        calibration = Calibration(
            tuple(layer.record for layer in layers),
            text=text,
            tokens=tokens,
            predictor=TRAINED if predictor_from is None else POWERINFER,
            sparsity=Sparsity(method, target_sparsity) if target_sparsity else None,
        )
        _write(model.bundle, destination or path, layers, calibration)
    return calibration


def _all(found: Iterable[Layer], states: TextStates, path: Path | str) -> list[Layer]:
    """What ``found`` yields; UserError where states overflow."""
    layers: list[Layer] = []
    with np.errstate(over="ignore", invalid="ignore"):  # found in the states
        try:
            for layer in found:
                layers.append(layer)
                if not np.isfinite(states.h).all():
                    raise np.linalg.LinAlgError
        except np.linalg.LinAlgError:
            raise UserError(
                f"{path}: layer {len(layers)} cannot be calibrated: its weights give values that "
                "are not finite"
            ) from None
    return layers


def _check_layout(bundle: Bundle, layout: LayoutName) -> None:
    """Raise UserError where a bundle cannot have such a layout."""
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if layout != "trained" and bundle.config.mixture:
        raise UserError(
            f"{bundle.path}: the experts of a mixture lie in their order; --layout {layout} is for "
            "models without experts"
        )


def _check(
    bundle: Bundle, target_sparsity: float | None, predictor_from: Path | str | None
) -> None:
    """Raise UserError where a bundle cannot be calibrated so."""
    path, config = bundle.path, bundle.config
    if config.mixture and (target_sparsity or predictor_from):
        raise UserError(
            f"{path}: of a mixture of experts, which of them a text uses is found; it takes no "
            "thresholds and no predictors"
        )
    if config.needs_all:
        raise UserError(
            f"{path}: its feed-forward networks are always used whole, because each neuron's part "
            "depends on all of the others; there is nothing to predict"
        )
    if not config.mixture and config.sparse == (target_sparsity is not None):
        raise UserError(
            f"{path}: its activation, {config.activations}, leaves "
            + ("neurons silent by itself; --target-sparsity is for those that do not"
               if target_sparsity else
               "no neuron silent; --target-sparsity 0.5 takes half of them as silent")
        )  # fmt: skip
    if target_sparsity and any(layer.ffn.matrices for layer in config.layers):
        raise UserError(
            f"{path}: its FFNs lie as a GGUF file has them, where no neuron can be read by itself; "
            "convert it with --dtype"
        )


def _check_destination(
    destination: Path | str, bundle: Bundle, predictor_from: Path | str | None
) -> None:
    """Raise UserError where the result could not be written, before an hour's work for it."""
    refuse_loss(destination, [predictor_from] if predictor_from else [])
    refuse_target(destination, bundle.file.size)
    for source in bundle.source_files:
        refuse_apart(destination, source)


def _length(
    config: ModelConfig, wanted: int, there: int, others: int, budget: int, routes: bool
) -> tuple[int, int]:
    """(tokens to calibrate on, of a sequence), as many as fit; UserError where they are too few.

    there, others  tokens of the text, and of others
    """
    fitting = tokens_that_fit if routes else _tokens_that_fit
    there += others if there >= LEAST_TOKENS else 0
    tokens = min(wanted, there, fitting(config, budget))
    sequence = min(SEQUENCE, config.max_position_embeddings)
    tokens = tokens // sequence * sequence if tokens > sequence else tokens
    if tokens < LEAST_TOKENS:
        raise UserError(
            f"{tokens} tokens are too few to calibrate on; at least {LEAST_TOKENS}, and several "
            "thousand for good predictors"
            + ("" if tokens == there else " (more --memory allows more tokens)")
        )
    return tokens, sequence


def _tokens_that_fit(config: ModelConfig, budget: int) -> int:
    """Tokens whose states, inputs (early ones, too), outputs, bits and scores fit a third of the
    budget, beside some neurons' activations."""
    neurons = max(layer.ffn.neurons for layer in config.layers)
    per_token = 4 * state_numbers(config) + neurons // 4 + 256 * 8
    return max(0, budget // 3 - PIECE_BYTES * piece_values(budget)) // per_token


def _opened(path: Path | str, budget: int, context: int, threads: int | None) -> Model:
    """The model, with all of its neurons, in two thirds of the budget: a layer's inputs and what
    fires take the other. Raises BudgetError, which names the least budget of both."""
    bundle = Bundle(path, calibrated=False, memory=memory.header_room(budget))
    try:
        return Model.open(
            bundle, memory=budget - budget // 3, neurons="dense", context=context, threads=threads
        )
    except BudgetError as error:
        least = -(-error.least * 3 // (2 << 20)) + 1  # MiB
        raise BudgetError(
            f"{path}: --memory {budget >> 20}M is too small; the least to calibrate with a context "
            f"of {context} tokens is {least}M",
            least << 20,
        ) from None


def _cut(ffn: FeedForward, x: Float32Array, method: Method, target: float) -> Cut:
    """The Cut below which the share ``target`` of a layer's neurons lies, on a sample."""
    x = np.ascontiguousarray(x[:: -(-len(x) // SAMPLE)])
    found = []
    for first, stop, tile, starts in ffn.store.tiles():
        neurons = np.arange(first, stop)
        if method == "teal":
            sizes = np.abs(ffn.neurons.activations(tile, starts, x, neurons))
        else:
            sizes = ffn.neurons.products(ffn.neurons.first, tile, starts, x, neurons)
            if method == "cats":
                kernels.activate(sizes, ffn.neurons.config.activation, ffn.neurons.config.threshold)
                np.abs(sizes, out=sizes)
        found.append(sizes)
    return Cut(method, float(np.quantile(np.concatenate(found), target)))


def _own_predictor(
    number: int,
    ffn: FeedForward,
    observed: Observations,
    missed: float,
    steps: int,
    kind: Choice,
) -> Found:
    """A layer's predictor, found on the text: see ``find_predictor``."""
    bundle_bytes = ffn.store.bundles.row_bytes
    return find_predictor(observed, *up_projection(ffn), bundle_bytes, missed, steps, kind)


def up_projection(ffn: FeedForward) -> tuple[UpTiles, Float32Array]:
    """(a function that yields its rows, its bias (d_ffn,)) of what decides whether a layer's
    neurons fire: the up projection, or the gate's where there is one."""
    d_ffn, width = ffn.store.bundles.rows, np.arange(ffn.neurons.width)

    def up_tiles() -> Iterator[tuple[int, Float32Array]]:
        for first, stop, tile, starts in ffn.store.tiles():
            for begin in range(first, stop, 512):
                end = min(begin + 512, stop)
                raw = tile[starts[begin - first : end - first, None] + width]
                yield begin, ffn.neurons.format.decode(raw)

    up_bias = ffn.neurons.biases[ffn.neurons.first]
    up_bias = np.zeros(d_ffn, np.float32) if up_bias is None else up_bias.copy()
    up_bias -= np.float32(ffn.neurons.config.threshold)
    return up_tiles, up_bias


def _imported(
    bundle: Bundle, source: Path | str, number: int, ffn: FeedForward, observed: Observations
) -> Found:
    """A layer's predictor as it comes with PowerInfer's models."""
    threshold = bundle.hf_config.get("sparse_threshold") or 0.0
    if not is_number(threshold, -LARGEST_FLOAT32, LARGEST_FLOAT32):
        raise UserError(f"{bundle.path}: its config's sparse_threshold is not a number")
    shape = bundle.config.hidden_size, ffn.neurons.config.neurons
    return count(imported(source, number, *shape, threshold), observed, observed.split()[1:])


def _write(
    bundle: Bundle, destination: Path | str, layers: list[Layer], calibration: Calibration
) -> None:
    """The bundle again, with these predictors and places of neurons."""
    found = [layer.found for layer in layers if layer.found is not None]
    places = {i: layer.places for i, layer in enumerate(layers) if layer.places is not None}
    ranks = [0 if layer.found is None else len(layer.found.a) for layer in layers]
    specs = predictor_layout(bundle.config, ranks if found else [])
    values = [array for f in found for array in (f.a, f.b, f.bias)]
    new = [
        new_tensor(spec.name, format_of(spec), spec.shape, partial(iter, [value]))
        for spec, value in zip(specs, values, strict=True)
    ]
    made = ".predictor.", ".ffn.places"
    old = stored_tensors(bundle, lambda name: not any(part in name for part in made))
    small = sum(spec.role == "small" for spec in layout(bundle.config))
    write_bundle(
        destination,
        laid_out(bundle, old[:small] + new + old[small:], places or None),
        bundle.hf_config,
        bundle.source,
        calibration,
        in_place=bundle.in_place,
    )
