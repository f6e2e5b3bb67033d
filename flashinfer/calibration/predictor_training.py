"""Finding a layer's low-rank predictor from its FFN's inputs (paper section 3.1).

The start is the truncated SVD of the up projection in the metric of the inputs' covariance, which
is the low-rank approximation of the pre-activations with the least mean square error. Inputs of
other texts than the calibration's lie elsewhere, so that the covariance is mixed with that of
inputs which lie anywhere (UNLIKE). Logistic
regression then improves it, with a loss balanced between the many silent neurons and the few that
fire. Of the two predictors the one that predicts fewer neurons on held-out tokens is kept. The
threshold is the one with which at most the share ``missed`` of the neurons that fire there is
missed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

import numpy as np

from flashinfer.calibration.traces import window_counts
from flashinfer.formats.arrays import BoolArray, Float32Array, Int64Array, UInt8Array

RANKS = (16, 32, 64, 128, 256, 512, 1024)
UNLIKE = 0.2  # the share of such inputs
BLOCK = 512  # neurons scored at a time
# The cost of a predicted neuron's bytes relative to the predictor's own. About a quarter of them
# are read from flash, as the window holds the rest, and flash is some 32 times slower than DRAM.
FLASH_COST = 8
ALL = slice(None)

# Which of a layer's predictors to keep: the SVD, the trained one, or the better of the two.
Choice = Literal["better", "svd", "trained"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
# A function that yields (first, rows (n, d_model)) through the up projection.
UpTiles = Callable[[], Iterable[tuple[int, Float32Array]]]


class Maps(NamedTuple):
    """A low-rank predictor: the neurons with b (a x) + bias > 0 are predicted to fire."""

    a: Float32Array  # (rank, d_model)
    b: Float32Array  # (d_ffn, rank)
    bias: Float32Array  # (d_ffn,)


@dataclass
class Inputs:
    """What a layer's predictor is asked about N tokens.

    x       (N, d_model), what it reads: the FFN's normalised inputs, or the residual stream
    routed  (N, experts): of a mixture, which tokens chose which expert, whose neurons alone are
            predicted for them. None: all neurons are
    """

    x: Float32Array
    routed: BoolArray | None = field(default=None, kw_only=True)

    def asked(
        self, n_neurons: int, neurons: slice, tokens: Int64Array | slice
    ) -> BoolArray | Literal[True]:
        """Which of ``neurons`` are predicted for which tokens, (n, len(tokens)); True for all.

        n_neurons  of the layer
        """
        if self.routed is None:
            return True
        experts = np.arange(n_neurons)[neurons] // (n_neurons // self.routed.shape[1])
        return self.routed[tokens][:, experts].T


@dataclass
class Observations(Inputs):
    """The behaviour of a layer on N tokens.

    fired   (d_ffn, ceil(N / 8)): which neurons fired, as packed bits, one row per neuron
    starts  the tokens with which sequences begin, ascending, 0 first
    others  the first so many tokens are of other texts, which a predictor is to know, too
    """

    fired: UInt8Array
    starts: Int64Array
    others: int = 0

    def bits(self, neurons: slice, tokens: Int64Array) -> BoolArray:
        """Which of ``neurons`` fired for ``tokens``, (n, len(tokens))."""
        return np.unpackbits(self.fired[neurons], axis=1, count=len(self.x))[:, tokens].astype(bool)

    def split(self) -> list[Int64Array]:
        """[tokens to fit, two halves of the held-out tokens]; every third sequence is held out."""
        sequence = np.searchsorted(self.starts, np.arange(len(self.x)), side="right") - 1
        if len(self.starts) < 4:  # too few sequences: cut the tokens into six runs
            sequence = np.arange(len(self.x)) * 6 // len(self.x)
        held_out = sequence % 3 == 2
        first = held_out & (sequence // 3 % 2 == 0)
        return [np.flatnonzero(m) for m in (~held_out, first, held_out & ~first)]


@dataclass
class Found:
    """A layer's predictor, with its figures on held-out tokens; a, b and bias: see Maps.

    active     share of the neurons that fire
    predicted  share of the neurons that are predicted to fire
    missed     share of the neurons that fire that are not predicted
    tried      {kind: [predicted, missed]} of all predictors that were tried
    between    "relu" where a ReLU stands between a and b, else ""
    """

    a: Float32Array
    b: Float32Array
    bias: Float32Array
    active: float
    predicted: float
    missed: float
    tried: dict[str, list[float]] = field(default_factory=dict)
    between: str = ""

    def scores(self, x: Float32Array, neurons: slice = ALL) -> Float32Array:
        """x (N, d_model) -> the scores of ``neurons``, (n, N)."""
        inner = self.a @ x.T
        inner = np.maximum(inner, 0) if self.between == "relu" else inner
        return self.b[neurons] @ inner + self.bias[neurons, None]

    def says(self, inputs: Inputs, tokens: Int64Array | slice, neurons: slice = ALL) -> BoolArray:
        """Which of ``neurons`` are predicted for which of the inputs' tokens, (n, tokens)."""
        asked = inputs.asked(len(self.b), neurons, tokens)
        return (self.scores(inputs.x[tokens], neurons) > 0) & asked

    def cost(self, bundle_bytes: int) -> float:
        """The bytes that a token needs, those from flash weighted with FLASH_COST."""
        weights = 2 * (self.a.size + self.b.size)
        return weights + FLASH_COST * self.predicted * len(self.b) * bundle_bytes


def find_predictor(
    observed: Observations,
    up_tiles: UpTiles,
    up_bias: Float32Array,
    bundle_bytes: int,
    missed: float = 0.05,
    steps: int = 300,
    kind: Choice = "better",
    seed: int = 0,
) -> Found:
    """Find a layer's predictor, whose weights have values that float16 can hold.

    up_bias       (d_ffn,)
    bundle_bytes  of a neuron's bundle
    missed        share of the active neurons that may be missed on either half of the held-out
                  tokens
    steps         of training after the SVD; 0: none
    """
    fit, *held_out = observed.split()
    of_rising_rank = svd_predictors(observed.x[fit], up_tiles, up_bias)
    best = judge(next(of_rising_rank), observed, held_out, missed)
    for maps in of_rising_rank:
        found = judge(maps, observed, held_out, missed)
        if found.cost(bundle_bytes) >= best.cost(bundle_bytes):
            break
        best = found
    best.tried = {"svd": [best.predicted, best.missed]}
    if steps and kind != "svd":
        maps = train(best, observed, fit, steps, np.random.default_rng(seed))
        found = judge(maps, observed, held_out, missed)
        found.tried = {**best.tried, "trained": [found.predicted, found.missed]}
        if kind == "trained" or found.predicted < best.predicted:
            return found
        best.tried = found.tried
    return best


def svd_predictors(
    x: Float32Array,
    up_tiles: UpTiles,
    up_bias: Float32Array,
    tried: Sequence[int] = RANKS,
    unlike: float = UNLIKE,
) -> Iterator[Maps]:
    """Yield the Maps of rising rank, at least one: truncated SVDs of the up projection W.

    x      (N, d_model), the FFN's inputs
    tried  ranks, of which those are taken that save anything
    unlike the share of inputs that lie anywhere, as those of other texts may
    With C the covariance of all these inputs and U the left singular vectors of W C^(1/2), U U^T W
    is the best low-rank W for them: a = U^T W, b = U.
    """
    mean = x.mean(axis=0)
    centred = x - mean
    covariance = centred.T @ centred / max(1, len(x))
    anywhere = (
        np.eye(len(covariance), dtype=covariance.dtype) * covariance.trace() / len(covariance)
    )
    values, vectors = np.linalg.eigh((1 - unlike) * covariance + unlike * anywhere)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T  # C^(1/2)
    gram = np.zeros_like(root)  # W^T W
    offset = up_bias.copy()  # W mean + bias: the mean pre-activation
    for first, rows in up_tiles():
        gram += rows.T @ rows
        offset[first : first + len(rows)] += rows @ mean
    energies, v = np.linalg.eigh(root @ gram @ root)
    energies, v = energies[::-1], v[:, ::-1]
    most = int(np.count_nonzero(energies > 1e-7 * energies[0]))
    ranks = [r for r in tried if r < min(most, x.shape[1] // 2)] or [max(1, min(most, tried[0]))]
    width = ranks[-1]
    least = np.finfo(energies.dtype).tiny  # instead of none, where W is zero
    v = v[:, :width] / np.sqrt(np.maximum(energies[:width], least))
    a = v.T @ root @ gram  # (width, d_model)
    to_u = root @ v  # (d_model, width): U = W C^(1/2) V S^-1
    b = np.empty((len(up_bias), width), dtype=np.float32)
    for first, rows in up_tiles():
        b[first : first + len(rows)] = rows @ to_u
    for rank in ranks:
        yield Maps(a[:rank], b[:, :rank], offset - b[:, :rank] @ (a[:rank] @ mean))


def train(
    start: Found,
    observed: Observations,
    fit: Int64Array,
    steps: int,
    random: np.random.Generator,
    batch: int = 256,
    rate: float = 1e-3,
) -> Maps:
    """Logistic regression by Adam, from ``start``, on the tokens ``fit``.

    The loss of neurons that fire is weighted by how rare they are, at most 16 times.
    """
    parameters = [start.a.astype(np.float32), start.b.astype(np.float32), start.bias.copy()]
    scale = float(np.std(start.scores(observed.x[fit[:batch]]))) or 1.0
    parameters[1] /= scale  # scores of unit spread: logits that the loss can work with
    parameters[2] /= scale
    asked = 1.0 if observed.routed is None else observed.routed.mean()
    weight = min(16.0, 0.5 / max(start.active / asked, 1e-4))
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]
    for step in range(1, steps + 1):
        tokens = np.sort(random.choice(fit, min(batch, len(fit)), replace=False))
        a, b, bias = parameters
        x = observed.x[tokens]  # (T, d_model)
        inner = x @ a.T  # (T, rank)
        fires = observed.bits(slice(None), tokens).T  # (T, d_ffn)
        errors = 1 / (1 + np.exp(-np.clip(inner @ b.T + bias, -30, 30))) - fires
        errors *= np.where(fires, weight, 1) / len(tokens)
        errors *= np.transpose(observed.asked(len(b), slice(None), tokens))
        errors = errors.astype(np.float32)
        gradients = [(errors @ b).T @ x, errors.T @ inner, errors.sum(axis=0)]
        pace = rate * (1 - step / (steps + 1))
        for p, g, (m, v) in zip(parameters, gradients, moments, strict=True):
            m += 0.1 * (g - m)
            v += 0.01 * (g * g - v)
            spread = np.sqrt(v / (1 - 0.99**step)) + 1e-12
            p -= pace * max(1e-6, float(np.abs(p).mean())) * (m / (1 - 0.9**step)) / spread
    return Maps(*parameters)


def judge(maps: Maps, observed: Observations, held_out: list[Int64Array], missed: float) -> Found:
    """The Found of these Maps, rounded to float16.

    Its threshold, which becomes a part of the bias, and its figures come from the held-out halves.
    """
    found = Found(
        maps.a.astype(np.float16).astype(np.float32),
        maps.b.astype(np.float16).astype(np.float32),
        maps.bias.astype(np.float32),
        0.0,
        0.0,
        0.0,
    )
    thresholds, spread = [], 0.0
    for tokens in held_out:
        scores = np.concatenate(
            [
                found.scores(observed.x[tokens], n)[observed.bits(n, tokens)]
                for n in _blocks(found.b)
            ]
        )
        if len(scores):
            thresholds.append(np.quantile(scores, missed, method="lower"))
            spread = max(spread, float(np.abs(scores).max()))
    # The threshold lies a little lower, so that rounding does not drop the score that defines it.
    found.bias -= np.float32(min(thresholds, default=0.0) - 1e-5 * spread)
    return count(found, observed, held_out)


def count(found: Found, observed: Observations, held_out: list[Int64Array]) -> Found:
    """Fill in the figures of a Found on the held-out tokens; return it."""
    b = found.b
    tokens = np.concatenate(held_out)
    active = predicted = both = 0
    for neurons in _blocks(b):
        fires, says = observed.bits(neurons, tokens), found.says(observed, tokens, neurons)
        active += np.count_nonzero(fires)
        predicted += np.count_nonzero(says)
        both += np.count_nonzero(fires & says)
    pairs = len(b) * len(tokens)
    found.active, found.predicted = active / pairs, predicted / pairs
    found.missed = 1 - both / active if active else 0.0
    return found


def on_own_text(found: Found, observed: Observations) -> Found:
    """The same predictor, with its figures on the held-out tokens of the text itself."""
    _, *held_out = observed.split()
    return count(replace(found), observed, [part[part >= observed.others] for part in held_out])


def window_rows(
    found: Found, observed: Observations
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Neurons that windows of 1 to 8 tokens need on the held-out tokens of the text itself: (means,
    maxima)."""
    _, *held_out = observed.split()
    tokens = np.sort(np.concatenate(held_out))
    tokens = tokens[tokens >= observed.others]
    fresh = np.isin(tokens, observed.starts) | (np.diff(tokens, prepend=-2) > 1)

    def uses() -> Iterator[tuple[BoolArray, bool]]:
        for first in range(0, len(tokens), 256):
            says = found.says(observed, tokens[first : first + 256]).T
            yield from zip(says, fresh[first : first + 256], strict=True)

    counts = window_counts(uses())
    return tuple(counts.mean(axis=0).tolist()), tuple(counts.max(axis=0).tolist())


def _blocks(b: Float32Array) -> list[slice]:
    return [slice(first, first + BLOCK) for first in range(0, len(b), BLOCK)]
