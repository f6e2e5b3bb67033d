"""Finding out which neurons fire: run a text densely, make predictors, write them down."""

from functools import partial

import numpy as np

from flashinfer import kernels
from flashinfer.calibration import routing as calibrate_routing
from flashinfer.calibration.predictor_import import imported
from flashinfer.calibration.predictor_training import (
    Observations,
    count,
    find_predictor,
    window_rows,
)
from flashinfer.calibration.text_states import TextStates
from flashinfer.calibration.traces import miss_curve
from flashinfer.formats.bundle.calibration import (
    POWERINFER,
    TRAINED,
    Calibration,
    Cut,
    LayerCalibration,
    Sparsity,
)
from flashinfer.formats.bundle.layout import format_of, layout, predictor_layout
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.bundle.writer import new_tensor, stored_tensors, write_bundle
from flashinfer.formats.errors import UserError
from flashinfer.formats.files import refuse_loss, refuse_target
from flashinfer.formats.numbers import LARGEST_FLOAT32, is_number
from flashinfer.formats.progress import no_progress
from flashinfer.model import Model
from flashinfer.paper.selection import Selection
from flashinfer.plan import memory

SEQUENCE = 256  # tokens that attend to each other
LEAST_TOKENS = 512
SAMPLE = 128  # tokens that thresholds are found on
CACHE_TOKENS = 2048  # the last of the text, on which caches of several sizes are tried


def calibrate(
    path,
    token_ids,
    destination=None,
    text="",
    tokens=8192,
    missed=0.05,
    steps=300,
    memory_budget=None,
    threads=None,
    progress=no_progress,
    target_sparsity=None,
    method="cats",
    predictor="better",
    predictor_from=None,
):
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
    target_sparsity  share of a layer's neurons to take as silent where the activation leaves none
                 so; in force where ``neurons="predicted"`` is asked for, and not exact
    method       which: those whose gate, before its activation, is least ("threshold"); whose
                 gate, after it, is smallest ("cats", Lee et al. 2024); whose contribution to the
                 down projection is ("teal", Liu et al. 2024, there for each input of a product)

    Raises UserError where the text is too short, the result could not be written, or the model
    gives states that are not finite.
    """
    budget = memory.default_budget() if memory_budget is None else memory_budget
    room = memory.header_room(budget)
    with Bundle(path, calibrated=False, memory=room) as bundle:
        config = bundle.config
        # Experts with a ReLU have silent neurons, too; no model is known that has biases as well.
        apart = config.sparse and not config.ffn_bias and predictor != "none"
        routes = bool(config.experts) and not apart
        _check(bundle, target_sparsity, predictor_from)
        _check_destination(destination or path, bundle, predictor_from)
        tokens, sequence = _length(config, tokens, len(token_ids), budget, routes)
    with Model.open(
        Bundle(path, calibrated=False, memory=room),
        memory=_model_budget(budget),
        neurons="dense",
        context=sequence,
        threads=threads,
    ) as model:
        states = TextStates(model, np.asarray(token_ids[:tokens]), sequence)
        predict = partial(_own_predictor, missed=missed, steps=steps, kind=predictor)
        if predictor_from is not None:
            predict = partial(_imported, model.bundle, predictor_from)
        find_cut = target_sparsity and partial(_cut, method=method, target=target_sparsity)
        if routes:
            found = ((None, record) for record in calibrate_routing.routing(states, progress))
        else:
            residual = predictor_from is not None
            found = _layers(states, predict, residual, find_cut, progress)
        predictors, layers = _all(found, states, path)
        calibration = Calibration(
            tuple(layers),
            text=text,
            tokens=tokens,
            predictor=TRAINED if predictor_from is None else POWERINFER,
            sparsity=Sparsity(method, target_sparsity) if target_sparsity else None,
        )
        _write(model.bundle, destination or path, predictors, calibration)
    return calibration


def _all(found, states, path):
    """([Found], [record]) of the layers that ``found`` yields; UserError where states overflow."""
    predictors, layers = [], []
    with np.errstate(over="ignore", invalid="ignore"):  # found in the states
        try:
            for predictor, record in found:
                predictors += [] if predictor is None else [predictor]
                layers.append(record)
                if not np.isfinite(states.h).all():
                    raise np.linalg.LinAlgError
        except np.linalg.LinAlgError:
            raise UserError(
                f"{path}: layer {len(layers)} cannot be calibrated: its weights give values that "
                "are not finite"
            ) from None
    return predictors, layers


def _check(bundle, target_sparsity, predictor_from):
    """Raise UserError where a bundle cannot be calibrated so."""
    path, config = bundle.path, bundle.config
    if config.experts and (target_sparsity or predictor_from):
        raise UserError(
            f"{path}: of a mixture of experts, which of them a text uses is found; it takes no "
            "thresholds and no predictors"
        )
    if not config.experts and config.sparse == (target_sparsity is not None):
        raise UserError(
            f"{path}: its activation, {config.activation}, leaves "
            + ("neurons silent by itself; --target-sparsity is for those that do not"
               if target_sparsity else
               "no neuron silent; --target-sparsity 0.5 takes half of them as silent")
        )  # fmt: skip


def _check_destination(destination, bundle, predictor_from):
    """Raise UserError where the result could not be written, before an hour's work for it."""
    refuse_loss(destination, [predictor_from] if predictor_from else [])
    refuse_target(destination, bundle.file.size)


def _length(config, wanted, there, budget, routes):
    """(tokens to calibrate on, of a sequence), as many as fit; UserError where they are too few."""
    fitting = calibrate_routing.tokens_that_fit if routes else _tokens_that_fit
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


def _tokens_that_fit(config, budget):
    """Tokens whose states, inputs (early ones, too), outputs, bits and scores fit a third of the
    budget."""
    per_token = 6 * config.hidden_size * 4 + config.d_ffn // 4 + 256 * 8
    return max(0, budget // 3 // per_token)


def _model_budget(budget):
    return budget - budget // 3


def _layers(states, predict, residual, find_cut, progress):
    """Yield (Found, its record) layer by layer; ``residual``: the predictors read that."""
    layers, early = states.model.layers, None
    for number, layer in enumerate(layers):
        progress("calibrate", number, len(layers))
        ffn = layer.feed_forward
        x, before = states.attend(layer, residual)
        if find_cut:
            ffn.neurons.cut = find_cut(ffn, x)
        asked, early = early, _early(states, number + 1, residual)
        weights = ffn.predictor.weights(x) if ffn.neurons.config.experts else None  # (N, experts)
        observed = Observations(x, None, states.starts, None if weights is None else weights > 0)
        states.add(layer, _feed_forward(ffn, observed, weights))
        progress("calibrate", number + 0.3, len(layers))
        observed.x = before if residual else x
        found = predict(number, ffn, observed)
        yield found, _record(found, observed, asked, ffn.neurons.cut)
    progress("calibrate", len(layers), len(layers))


def _early(states, number, residual):
    """What a layer's predictor would be asked one layer early, as Observations, or None."""
    inputs = states.early_input(number, CACHE_TOKENS)
    if inputs is None:
        return None
    ffn, (normed, before) = states.model.layers[number].feed_forward, inputs
    routed = ffn.predictor.weights(normed) > 0 if ffn.neurons.config.experts else None
    return Observations(np.array(before if residual else normed), None, states.starts, routed)


def _record(found, observed, asked, cut):
    """What the bundle says of a layer; asked: the Observations of one layer early."""
    means, most = window_rows(found, observed)
    return LayerCalibration(
        active=found.active,
        predicted=found.predicted,
        missed=found.missed,
        rank=len(found.a),
        tried=found.tried,
        cut=cut,
        window_rows=tuple(means),
        window_rows_most=tuple(most),
        misses=miss_curve(_trace(found, observed), len(found.b)),
        guessed=0.0 if asked is None else _guessed(found, observed, asked),
    )


def _feed_forward(ffn, observed, weights):
    """The exact FFN over observed.x (N, d_model) -> (N, d_model); notes which neurons fired.

    weights  (N, experts): what each of a mixture's experts counts, or None
    """
    x = observed.x
    y = np.zeros_like(x) if ffn.shared is None else ffn.shared(x)
    observed.fired = np.zeros((ffn.store.bundles.rows, -(-len(x) // 8)), dtype=np.uint8)
    neurons = ffn.neurons
    for first, stop, tile, starts in ffn.store.tiles():
        for begin, end, expert in _parts(ffn, first, stop, len(x)):
            rows = starts[begin - first : end - first]
            tokens = slice(None) if weights is None else np.flatnonzero(observed.routed[:, expert])
            a = neurons.activations(tile, rows, x[tokens], np.arange(begin, end))
            fired, its_y = np.zeros((len(rows), len(x)), dtype=bool), y[tokens]
            fired[:, tokens] = a != 0
            observed.fired[begin:end] = np.packbits(fired, axis=1)
            if weights is not None:
                a *= weights[tokens, expert]
            kernels.sparse_down(tile, rows + neurons.down_at, neurons.format, a, its_y)
            y[tokens] = its_y
    return y if neurons.biases["down"] is None else y + neurons.biases["down"]


def _parts(ffn, first, stop, n_tokens):
    """Yield (begin, end, expert) through the neurons first:stop, of one expert each, so few that
    the activations (n, N) stay within some MB."""
    step, each = max(1, (4 << 20) // n_tokens), ffn.neurons.config.unit_neurons
    each = each if ffn.neurons.config.experts else stop
    while first < stop:
        expert = first // each
        end = min(first + step, stop, (expert + 1) * each)
        yield first, end, expert
        first = end


def _cut(ffn, x, method, target):
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


def _own_predictor(number, ffn, observed, missed, steps, kind):
    d_ffn, width = ffn.store.bundles.rows, np.arange(ffn.neurons.width)

    def up_tiles():  # or the gate's, which decides where there is one
        for first, stop, tile, starts in ffn.store.tiles():
            for begin in range(first, stop, 512):
                end = min(begin + 512, stop)
                raw = tile[starts[begin - first : end - first, None] + width]
                yield begin, ffn.neurons.format.decode(raw)

    up_bias = ffn.neurons.biases[ffn.neurons.first]
    up_bias = np.zeros(d_ffn, np.float32) if up_bias is None else up_bias.copy()
    up_bias -= np.float32(ffn.neurons.config.threshold)
    return find_predictor(
        observed, up_tiles, up_bias, ffn.store.bundles.row_bytes, missed, steps, kind
    )


def _imported(bundle, source, number, ffn, observed):
    """A layer's predictor as it comes with PowerInfer's models."""
    threshold = bundle.hf_config.get("sparse_threshold") or 0.0
    if not is_number(threshold, -LARGEST_FLOAT32, LARGEST_FLOAT32):
        raise UserError(f"{bundle.path}: its config's sparse_threshold is not a number")
    shape = bundle.config.hidden_size, bundle.config.d_ffn
    return count(imported(source, number, *shape, threshold), observed, observed.split()[1:])


def _trace(found, observed):
    """Yield the Selection of each of the text's last tokens."""
    for first in range(max(0, len(observed.x) - CACHE_TOKENS), len(observed.x), 256):
        for says in found.says(observed, slice(first, first + 256)).T:
            yield Selection.of_scores(says[None])


def _guessed(found, observed, early):
    """The share of the neurons predicted that the predictor named one layer early."""
    begin, right, used = len(observed.x) - len(early.x), 0, 0
    for first in range(0, len(early.x), 256):
        uses = found.says(observed, slice(begin + first, begin + first + 256))
        used += np.count_nonzero(uses)
        right += np.count_nonzero(uses & found.says(early, slice(first, first + 256)))
    return right / max(1, used)


def _write(bundle, destination, found, calibration):
    """The bundle again, with these predictors."""
    specs = predictor_layout(bundle.config, [len(f.a) for f in found])
    values = [array for f in found for array in (f.a, f.b, f.bias)]
    new = [
        new_tensor(spec.name, format_of(spec, None, None), spec.shape, lambda v=value: [v])
        for spec, value in zip(specs, values, strict=True)
    ]
    old = stored_tensors(bundle, lambda name: ".predictor." not in name)
    small = sum(spec.role == "small" for spec in layout(bundle.config))
    write_bundle(
        destination,
        old[:small] + new + old[small:],
        bundle.hf_config,
        bundle.source,
        calibration,
    )
