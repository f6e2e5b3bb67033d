"""Finding a layer's low-rank predictor from its FFN's inputs (paper section 3.1).

Start: the truncated SVD of the up projection in the metric of the inputs' covariance, which is
the best low-rank guess of the pre-activations in the mean square. Then logistic regression with
a loss balanced between the many silent neurons and the few that fire. Whichever predicts fewer
neurons on held-out tokens is kept; the threshold is the one that misses at most ``missed`` of
those that fire there.
"""

from dataclasses import dataclass, field

import numpy as np

from flashinfer.calibration.traces import window_counts

RANKS = (16, 32, 64, 128, 256, 512, 1024)
BLOCK = 512  # neurons scored at a time
# A neuron predicted costs its bundle's bytes from flash, about a quarter of the time (the window
# holds the rest) and some 32 times slower than the bytes of the predictor from DRAM.
FLASH_COST = 8


@dataclass
class Observations:
    """What a layer did on N tokens.

    x       (N, d_model) float32, the FFN's normalised inputs
    fired   (d_ffn, ceil(N / 8)) uint8: which neurons fired, packed bits, a row a neuron
    starts  where each sequence of tokens begins, ascending, 0 first
    routed  (N, experts) bool: of a mixture, which tokens chose which expert; only its neurons are
            asked for them. None: all of them are
    """

    x: np.ndarray
    fired: np.ndarray
    starts: np.ndarray
    routed: np.ndarray | None = None

    def bits(self, neurons, tokens):
        """Which of ``neurons`` (a slice) fired for ``tokens`` (ids): bool (n, len(tokens))."""
        return np.unpackbits(self.fired[neurons], axis=1, count=len(self.x))[:, tokens].astype(bool)

    def asked(self, n_neurons, neurons, tokens):
        """Which of ``neurons`` (a slice of so many) are asked for which tokens: bool
        (n, len(tokens)), or True for all."""
        if self.routed is None:
            return True
        experts = np.arange(n_neurons)[neurons] // (n_neurons // self.routed.shape[1])
        return self.routed[tokens][:, experts].T

    def split(self):
        """(tokens to fit, held-out halves): every third sequence is held out, alternately."""
        sequence = np.searchsorted(self.starts, np.arange(len(self.x)), side="right") - 1
        if len(self.starts) < 4:  # too few sequences: cut the tokens into six runs
            sequence = np.arange(len(self.x)) * 6 // len(self.x)
        held_out = sequence % 3 == 2
        first = held_out & (sequence // 3 % 2 == 0)
        return [np.flatnonzero(m) for m in (~held_out, first, held_out & ~first)]


@dataclass
class Found:
    """A predictor, scores = b (a x) + bias > 0, with what it does on held-out tokens."""

    a: np.ndarray  # (rank, d_model)
    b: np.ndarray  # (d_ffn, rank)
    bias: np.ndarray  # (d_ffn,)
    active: float
    predicted: float
    missed: float
    tried: dict = field(default_factory=dict)  # {kind: [predicted, missed]} of all that were tried

    between: str = ""  # "relu": that stands between a and b

    def scores(self, x, neurons=slice(None)):
        """x (N, d_model) -> (n, N) float32."""
        inner = self.a @ x.T
        inner = np.maximum(inner, 0) if self.between == "relu" else inner
        return self.b[neurons] @ inner + self.bias[neurons, None]

    def says(self, observed, tokens, neurons=slice(None)):
        """Which neurons are predicted for which of the observed tokens: bool (n, len(tokens))."""
        asked = observed.asked(len(self.b), neurons, tokens)
        return (self.scores(observed.x[tokens], neurons) > 0) & asked

    def cost(self, bundle_bytes):
        """Bytes that a token costs, those from flash weighted."""
        weights = 2 * (self.a.size + self.b.size)
        return weights + FLASH_COST * self.predicted * len(self.b) * bundle_bytes


def find_predictor(
    observed, up_tiles, up_bias, bundle_bytes, missed=0.05, steps=300, kind="better", seed=0
):
    """Find a layer's predictor; return Found, with float16 weights' values.

    up_tiles  a function that yields (first, rows (n, d_model) float32) through the up projection
    up_bias   (d_ffn,) float32
    missed    share of the active neurons that may be missed on either half of the held-out tokens
    steps     of training, after the SVD; 0: none
    kind      "svd", "trained", or the "better" of the two
    """
    fit, *held_out = observed.split()
    best = None
    for a, b, bias in svd_predictors(observed.x[fit], up_tiles, up_bias):
        found = judge(a, b, bias, observed, held_out, missed)
        if best is not None and found.cost(bundle_bytes) >= best.cost(bundle_bytes):
            break
        best = found
    best.tried = {"svd": [best.predicted, best.missed]}
    if steps and kind != "svd":
        a, b, bias = train(best, observed, fit, steps, np.random.default_rng(seed))
        found = judge(a, b, bias, observed, held_out, missed)
        found.tried = {**best.tried, "trained": [found.predicted, found.missed]}
        if kind == "trained" or found.predicted < best.predicted:
            return found
        best.tried = found.tried
    return best


def svd_predictors(x, up_tiles, up_bias):
    """Yield (a, b, bias) of rising rank: truncated SVDs of the up projection W.

    With C the inputs' covariance and U the left singular vectors of W C^(1/2), U U^T W is the
    best low-rank W for these inputs: a = U^T W, b = U.
    """
    mean = x.mean(axis=0)
    centred = x - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / max(1, len(x)))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T  # C^(1/2)
    gram = np.zeros_like(root)  # W^T W
    offset = up_bias.copy()  # W mean + bias: the mean pre-activation
    for first, rows in up_tiles():
        gram += rows.T @ rows
        offset[first : first + len(rows)] += rows @ mean
    energies, v = np.linalg.eigh(root @ gram @ root)
    energies, v = energies[::-1], v[:, ::-1]
    most = int(np.count_nonzero(energies > 1e-7 * energies[0]))
    ranks = [r for r in RANKS if r < min(most, x.shape[1] // 2)] or [max(1, min(most, RANKS[0]))]
    width = ranks[-1]
    v = v[:, :width] / np.sqrt(energies[:width])
    a = v.T @ root @ gram  # (width, d_model)
    to_u = root @ v  # (d_model, width): U = W C^(1/2) V S^-1
    b = np.empty((len(up_bias), width), dtype=np.float32)
    for first, rows in up_tiles():
        b[first : first + len(rows)] = rows @ to_u
    for rank in ranks:
        yield a[:rank], b[:, :rank], offset - b[:, :rank] @ (a[:rank] @ mean)


def train(start, observed, fit, steps, random, batch=256, rate=1e-3):
    """Logistic regression from ``start`` on the tokens ``fit``; returns (a, b, bias).

    Adam; a neuron that fires weighs as much more as it is rarer, up to 16 times.
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
    return parameters


def judge(a, b, bias, observed, held_out, missed):
    """Round to float16, set the threshold by the held-out halves, and count; returns Found."""
    found = Found(
        a.astype(np.float16).astype(np.float32),
        b.astype(np.float16).astype(np.float32),
        bias.astype(np.float32),
        0.0,
        0.0,
        0.0,
    )
    thresholds, spread = [], 0.0
    for tokens in held_out:
        scores = np.concatenate(
            [found.scores(observed.x[tokens], n)[observed.bits(n, tokens)] for n in _blocks(b)]
        )
        if len(scores):
            thresholds.append(np.quantile(scores, missed, method="lower"))
            spread = max(spread, float(np.abs(scores).max()))
    # A little below, so that the score at the threshold itself is above it however it is rounded.
    found.bias -= np.float32(min(thresholds, default=0.0) - 1e-5 * spread)
    return count(found, observed, held_out)


def count(found, observed, held_out):
    """Fill in what a Found predicts and misses on the held-out tokens; returns it."""
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


def window_rows(found, observed):
    """Neurons that windows of 1 to 8 tokens need on the held-out tokens: (means, most)."""
    _, *held_out = observed.split()
    tokens = np.sort(np.concatenate(held_out))
    fresh = np.isin(tokens, observed.starts) | (np.diff(tokens, prepend=-2) > 1)

    def uses():
        for first in range(0, len(tokens), 256):
            says = found.says(observed, tokens[first : first + 256]).T
            yield from zip(says, fresh[first : first + 256], strict=True)

    counts = window_counts(uses())
    return counts.mean(axis=0).tolist(), counts.max(axis=0).tolist()


def _blocks(b):
    return [slice(first, first + BLOCK) for first in range(0, len(b), BLOCK)]
