"""Several hidden states of a token in float64: how layers predict and correct them (AltUp), and
gates of which only the largest count."""

import numpy as np

from flashinfer.formats.arrays import Float64Array
from flashinfer.formats.layers.altup import AltUpConfig
from flashinfer.formats.layers.norm import NormConfig
from flashinfer.oracle import known
from flashinfer.oracle.arithmetic import Arithmetic
from flashinfer.oracle.known import F32, STEPS, Known
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.transformer.altup import LEAST_SQUARE


def state(x: Known, number: int) -> Known:
    """One of the states (T, n, d_model)."""
    return Known(x.value[:, number], None if x.noise is None else x.noise[:, number])


def together(states: list[Known]) -> Known:
    """States (T, d_model) each -> (T, n, d_model)."""
    parts = ([part.value for part in states], [part.spread for part in states])
    return Known(*(np.stack(part, axis=1) for part in parts))


class OfLayer:
    """A layer's updates of hidden states.

    weights  of the model; i: the layer; how: Arithmetic of the other engine
    """

    def __init__(self, weights: ModelWeights, i: int, how: Arithmetic) -> None:
        config = weights.config.layers[i].altup
        assert config is not None
        self.config: AltUpConfig = config
        self.weights, self.name, self.how = weights, f"layers.{i}.altup", how

    def predicted(self, states: Known) -> Known:
        """States (T, n, d_model) -> what they are thought to become."""
        n, how = self.config.states, self.how
        found = self._linear("predict", self._modalities(state(states, self.config.active)))
        made = []
        for row in range(n):
            parts = [state(states, row)]
            for read in range(n):
                at = slice(row * n + read, row * n + read + 1)
                share = Known(found.value[:, at], found.spread[:, at])
                parts.append(known.times(state(states, read), share, how))
            made.append(known.total(parts, how))
        return together(made)

    def corrected(self, predicted: Known, active: Known) -> Known:
        """Predicted states (T, n, d_model) and the one that the layer computed (T, d_model) ->
        states (T, n, d_model)."""
        how = self.how
        found = self._linear("correct", self._modalities(active))
        innovation = known.add(active, state(predicted, self.config.active), how, -1.0)
        made = []
        for number in range(self.config.states):
            factor = Known(
                found.value[:, number, None] + 1,
                found.spread[:, number, None] + F32 * (np.abs(found.value[:, number, None]) + 1),
            )
            change = known.times(innovation, factor, how)
            made.append(known.add(state(predicted, number), change, how))
        return together(made)

    def read(self, states: Known) -> Known:
        """What the layer's block for the token's own reads (T, d_model)."""
        found = state(states, self.config.active)
        if not self.config.correct_scale:
            return found
        return known.times(found, Known(self.weights[f"{self.name}.correct_scale"]), self.how)

    def _linear(self, part: str, x: Known) -> Known:
        return known.linear(x, self.weights[f"{self.name}.{part}.weight"], None, "f32", self.how)

    def _modalities(self, x: Known) -> Known:
        weight = self.weights.get(f"{self.name}.norm.weight")
        x = known.norm(x, self.config.norm, weight, None, self.how)
        x = known.scale(x, 1 / self.config.hidden_size, self.how)
        return known.apply(self._linear("router", x), np.tanh, self.how)


def begin(h: Known, weights: ModelWeights, how: Arithmetic) -> Known:
    """Embeddings (T, d_model) -> states (T, n, d_model)."""
    others = [_as_large(_turned(h, "in", i, weights, how), h, how) for i in _others(weights)]
    return together([h, *others])


def end(states: Known, weights: ModelWeights, how: Arithmetic) -> Known:
    """States (T, n, d_model) -> their mean (T, d_model), once they are turned back."""
    first = state(states, 0)
    others = [
        _as_large(_turned(state(states, i + 1), "out", i, weights, how), first, how)
        for i in _others(weights)
    ]
    return known.scale(known.total([first, *others], how), 1 / (len(others) + 1), how)


def _others(weights: ModelWeights) -> range:
    return range(weights.config.hidden_states - 1)


def _turned(x: Known, way: str, number: int, weights: ModelWeights, how: Arithmetic) -> Known:
    name = f"states.{way}.{number}.weight"
    return known.linear(x, weights[name], None, weights.format(name), how)


def _as_large(x: Known, other: Known, how: Arithmetic) -> Known:
    """x (T, d_model), scaled to the root mean square of another."""
    unit = known.norm(x, NormConfig("rms", 0.0), None, None, how)
    there = np.sqrt((x.value**2).mean(axis=1, keepdims=True))
    wanted = _root(other)
    short = np.minimum(there / np.sqrt(LEAST_SQUARE), 1.0)  # of states that are nearly nothing
    return known.times(unit, Known(wanted.value * short, wanted.spread * short), how)


def _root(x: Known) -> Known:
    """The root mean square of x (T, n): (T, 1)."""
    n = x.value.shape[1]
    root = np.sqrt((x.value**2).mean(axis=1, keepdims=True))
    noise = np.sqrt(((x.value * x.spread) ** 2).sum(axis=1, keepdims=True)) / (n * root)
    return Known(root, noise + root * F32 * (np.sqrt(n) + STEPS))


def cut(gates: Known, deviations: float) -> Known:
    """Gates (T, neurons), less what is so many standard deviations above their mean; at least 0."""
    value, n = gates.value, gates.value.shape[1]
    edge = value.mean(axis=1, keepdims=True) + deviations * value.std(axis=1, keepdims=True)
    own: Float64Array = np.sqrt((gates.spread**2).mean(axis=1, keepdims=True) / n)
    size = np.abs(value).mean(axis=1, keepdims=True) + np.abs(edge)
    off = own * (1 + abs(deviations)) + F32 * (np.sqrt(n) + STEPS) * size
    return Known(np.maximum(value - edge, 0), np.hypot(gates.spread, off))
