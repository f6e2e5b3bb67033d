"""Finding out which experts of a mixture a text uses, for the plan, the cache and a warm start."""

from flashinfer.calibration.traces import largest, routing_record


def tokens_that_fit(config, budget):
    """Tokens whose states and choices fit a third of the budget."""
    return max(0, budget // 3 // (6 * config.hidden_size * 4 + 9 * config.experts))


def routing(states, progress):
    """Yield the LayerCalibration of each layer along a text, given as TextStates."""
    layers, early = states.model.layers, None
    for number, layer in enumerate(layers):
        progress("calibrate", number, len(layers))
        x, residual = states.attend(layer)
        router = layer.feed_forward.predictor
        uses = largest(router.scores(x), router.per_token)
        record = routing_record(uses, early)
        following = states.early_input(number + 1)
        if following is not None:
            early = layers[number + 1].feed_forward.predictor.scores(following[0])
        states.add(layer, layer.feed_forward(x, 0, residual))
        yield record
    progress("calibrate", len(layers), len(layers))
