"""Finding out which neurons fire: run a text densely, make predictors, write them into the bundle.

Layer by layer: all the text's tokens pass one layer before the next, so each layer is read once
or thrice and what is kept in DRAM is one layer's inputs, whatever the model's size.
"""

import numpy as np

from flashinfer import calibrate_routing, kernels, memory
from flashinfer.formats.bundle import PREDICTOR_FORMS, Bundle
from flashinfer.formats.errors import UserError
from flashinfer.formats.layout import format_of, layout, predictor_layout
from flashinfer.formats.writing import new_tensor, stored_tensors, write_bundle
from flashinfer.model import Model
from flashinfer.predictor import Selection
from flashinfer.predictor_import import imported
from flashinfer.predictor_training import Observations, count, window_rows
from flashinfer.predictor_training import find_predictor as find_own
from flashinfer.traces import miss_curve

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
    progress=lambda done, total: None,
    target_sparsity=None,
    method="cats",
    predictor="better",
    predictor_from=None,
):
    """Calibrate the bundle at ``path`` on a text; return what was found, as the bundle holds it.

    token_ids    the text; its first ``tokens`` are used, fewer where the memory is too little
    destination  the bundle to write; None: replace the one at ``path``
    text         the text's name, for the record
    missed       share of the active neurons that a predictor may miss on held-out text
    steps        of training after the SVD
    progress     called as progress(layers done, layers in all), done in fractions
    predictor    "svd", "trained", or the "better" of the two; "none", for a mixture of experts
                 with a ReLU: only which experts are used, as of other mixtures
    predictor_from  predictors of PowerInfer's to be taken as they are: see predictor_import
    target_sparsity  share of a layer's neurons to take as silent where the activation leaves none
                 so; in force where ``neurons="predicted"`` is asked for, and not exact
    method       which: those whose gate, before its activation, is least ("threshold"); whose
                 gate, after it, is smallest ("cats", Lee et al. 2024); whose contribution to the
                 down projection is ("teal", Liu et al. 2024, there for each input of a product)

    Raises UserError where the text is too short.
    """
    budget = memory.default_budget() if memory_budget is None else memory_budget
    with Bundle(path, calibrated=False) as bundle:
        experts, sparse = bundle.config.experts, bundle.config.sparse
        # Experts with a ReLU have silent neurons, too; no model is known that has biases as well.
        apart = experts and sparse and not bundle.config.ffn_bias and predictor != "none"
        if experts and (target_sparsity or predictor_from):
            raise UserError(f"{path}: of a mixture of experts, which of them a text uses is found; "
                            "it takes no thresholds and no predictors")  # fmt: skip
        if not experts and sparse == (target_sparsity is not None):
            raise UserError(
                f"{path}: its activation, {bundle.config.activation}, leaves "
                + ("neurons silent by itself; --target-sparsity is for those that do not"
                   if target_sparsity else
                   "no neuron silent; --target-sparsity 0.5 takes half of them as silent")
            )  # fmt: skip
        fitting = _tokens_that_fit if apart or not experts else calibrate_routing.tokens_that_fit
        tokens = min(tokens, len(token_ids), fitting(bundle.config, budget))
        sequence = min(SEQUENCE, bundle.config.max_position_embeddings)
    tokens = tokens // sequence * sequence if tokens > sequence else tokens
    if tokens < LEAST_TOKENS:
        raise UserError(
            f"{tokens} tokens are too few to calibrate on; at least {LEAST_TOKENS}, and several "
            "thousand for good predictors" + (
                "" if tokens == len(token_ids) else " (more --memory allows more tokens)"
            )
        )  # fmt: skip
    with Model.open(
        Bundle(path, calibrated=False),
        memory=_model_budget(budget),
        neurons="dense",
        context=sequence,
        threads=threads,
    ) as model:
        if experts and not apart:
            layers = calibrate_routing.routing(
                model, np.asarray(token_ids[:tokens]), sequence, progress
            )
            calibration = {"text": text, "tokens": tokens, "layers": layers}
            _write(model.bundle, destination or path, [], calibration)
            return calibration
        found, layers = [], []

        def find_predictor(number, ffn, observed):
            if predictor_from is None:
                return _predictor(ffn, observed, missed, steps, predictor)
            threshold = model.bundle.hf_config.get("sparse_threshold") or 0.0
            if not isinstance(threshold, (int, float)):
                raise UserError(f"{path}: its config's sparse_threshold is not a number")
            shape = model.config.hidden_size, model.config.d_ffn
            one = imported(predictor_from, number, *shape, threshold)
            return count(one, observed, observed.split()[1:])

        for one, record in _layers(
            model, np.asarray(token_ids[:tokens]), sequence, progress,
            find_predictor, predictor_from is not None,
            target_sparsity and (lambda ffn, x: (method, _cut(ffn, x, method, target_sparsity))),
        ):  # fmt: skip
            found.append(one)
            layers.append(record)
        calibration = {"text": text, "tokens": tokens, "layers": layers}
        if predictor_from is not None:
            calibration["predictor"] = PREDICTOR_FORMS[1]
        if target_sparsity:
            calibration["sparsity"] = {"method": method, "target": target_sparsity}
        _write(model.bundle, destination or path, found, calibration)
    return calibration


def _tokens_that_fit(config, budget):
    """Tokens whose states, inputs (early ones, too), outputs, bits and scores fit a third of the
    budget."""
    per_token = 6 * config.hidden_size * 4 + config.d_ffn // 4 + 256 * 8
    return max(0, budget // 3 // per_token)


def _model_budget(budget):
    return budget - budget // 3


def _layers(model, ids, sequence, progress, find_predictor, residual, find_cut):
    """Yield (Found, its record) layer by layer; ``residual``: the predictors read that."""
    starts = np.arange(0, len(ids), sequence)
    h = np.concatenate([model.embed(ids[s : s + sequence]) for s in starts])  # (N, d_model)
    total, early = len(model.layers), None
    for number, layer in enumerate(model.layers):
        progress(number, total)
        x = np.empty_like(h)
        read = np.empty_like(h) if residual else x
        for start in starts:
            span = slice(start, start + sequence)
            h[span], x[span], before = model.attend(layer, h[span])
            if residual:
                read[span] = before
        if find_cut:
            layer.feed_forward.neurons.cut = find_cut(layer.feed_forward, x)
        asked, early = early, None
        if number + 1 < total:  # what the next layer's predictor would be asked early
            following = model.layers[number + 1]
            normed, before = model.early_input(following, h[-CACHE_TOKENS:])
            early = Observations(
                np.array(before if residual else normed),  # h will change
                None,
                starts,
                _routed(following.feed_forward, normed),
            )
        observed = Observations(x, None, starts, _routed(layer.feed_forward, x))
        y = _feed_forward(layer.feed_forward, observed)
        for start in starts:
            span = slice(start, start + sequence)
            h[span] = model.add_feed_forward(layer, h[span], y[span])
        del y
        progress(number + 0.3, total)
        observed.x = read
        found = find_predictor(number, layer.feed_forward, observed)
        means, most = window_rows(found, observed)
        yield (
            found,
            {
                "active": found.active,
                "predicted": found.predicted,
                "missed": found.missed,
                "rank": len(found.a),
                "tried": found.tried,
                **({"threshold": layer.feed_forward.neurons.cut[1]} if find_cut else {}),
                "window_rows": means,
                "window_rows_most": most,
                "misses": miss_curve(_trace(found, observed), len(found.b)),
                "guessed": 0.0 if asked is None else _guessed(found, observed, asked),
            },
        )
    progress(total, total)


def _feed_forward(ffn, observed):
    """The exact FFN over observed.x (N, d_model) -> (N, d_model); notes which neurons fired."""
    x = observed.x
    y = np.zeros_like(x) if ffn.shared is None else ffn.shared(x)
    observed.fired = np.zeros((ffn.bundles.rows, -(-len(x) // 8)), dtype=np.uint8)
    weights = None if observed.routed is None else ffn.predictor.weights(x)  # (N, experts)
    for first, stop, tile, starts in ffn.flash.stream(ffn.bundles, ffn.buffer):
        for begin, end, expert in _parts(ffn, first, stop, len(x)):
            rows, neurons = starts[begin - first : end - first], np.arange(begin, end)
            tokens = slice(None) if weights is None else np.flatnonzero(observed.routed[:, expert])
            a, its_y = ffn.neurons.activations(tile, rows, x[tokens], neurons), y[tokens]
            fired = np.zeros((len(rows), len(x)), dtype=bool)
            fired[:, tokens] = a != 0
            observed.fired[begin:end] = np.packbits(fired, axis=1)
            if weights is not None:
                a *= weights[tokens, expert]
            kernels.sparse_down(tile, rows + ffn.neurons.down_at, ffn.neurons.format, a, its_y)
            y[tokens] = its_y
    return y if ffn.neurons.biases["down"] is None else y + ffn.neurons.biases["down"]


def _parts(ffn, first, stop, n_tokens):
    """Yield (begin, end, expert) through the neurons first:stop, of one expert each, so few that
    the activations (n, N) stay within some MB."""
    step, each = max(1, (4 << 20) // n_tokens), ffn.config.unit_neurons
    each = each if ffn.config.experts else stop
    while first < stop:
        expert = first // each
        end = min(first + step, stop, (expert + 1) * each)
        yield first, end, expert
        first = end


def _routed(ffn, x):
    """Which tokens choose which expert of a mixture: (N, experts) bool; of others None."""
    return ffn.predictor.weights(x) > 0 if ffn.config.experts else None


def _cut(ffn, x, method, target):
    """The threshold below which the share ``target`` of a layer's neurons lies, on a sample."""
    x = np.ascontiguousarray(x[:: -(-len(x) // SAMPLE)])
    found = []
    for first, stop, tile, starts in ffn.flash.stream(ffn.bundles, ffn.buffer):
        neurons = np.arange(first, stop)
        if method == "teal":
            sizes = np.abs(ffn.neurons.activations(tile, starts, x, neurons))
        else:
            sizes = ffn.neurons.products(ffn.neurons.first, tile, starts, x, neurons)
            if method == "cats":
                kernels.activate(sizes, ffn.config.activation, ffn.config.threshold)
                np.abs(sizes, out=sizes)
        found.append(sizes)
    return float(np.quantile(np.concatenate(found), target))


def _predictor(ffn, observed, missed, steps, kind):
    d_ffn, width = ffn.bundles.rows, np.arange(ffn.neurons.width)

    def up_tiles():  # or the gate's, which decides where there is one
        for first, stop, tile, starts in ffn.flash.stream(ffn.bundles, ffn.buffer):
            for begin in range(first, stop, 512):
                end = min(begin + 512, stop)
                raw = tile[starts[begin - first : end - first, None] + width]
                yield begin, ffn.neurons.format.decode(raw)

    up_bias = ffn.neurons.biases[ffn.neurons.first]
    up_bias = np.zeros(d_ffn, np.float32) if up_bias is None else up_bias.copy()
    up_bias -= np.float32(ffn.config.threshold)
    return find_own(observed, up_tiles, up_bias, ffn.bundles.row_bytes, missed, steps, kind)


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
