"""Synthetic models of real shapes, to measure a board before downloading a real one.

Random weights, but a consistent model: its FFN fires for a given share of neurons, a given share
is new at each token, its predictor is right, and dense and predicted runs give the same tokens.

How: the hidden states carry a code c_t, |c_t| = 1, that turns along the sequence, in a subspace
Q that nothing else writes to. Each neuron's first row (up, or gate) looks at that subspace
through a random direction b_i (and, faintly, at everything else), so its pre-activation is about
b_i . c_t - threshold; Q^T is the predictor's first map and the rows b_i its second. How fast the
code turns steers how many neurons are new at a token.

Learned positions bring the code; where there are none the tokens do, and the output head makes
token t + 1 follow token t. The threshold is a bias; where there is none, every token also brings
a constant, in one direction more.
"""

from dataclasses import dataclass

import numpy as np

from flashinfer.formats.architectures import model_config
from flashinfer.formats.bundle import WINDOWS
from flashinfer.formats.errors import UserError
from flashinfer.formats.layout import SMALL, format_of, layout, predictor_layout
from flashinfer.formats.number_formats import number_format
from flashinfer.formats.writing import new_tensor, write_bundle
from flashinfer.neuron_cache import miss_curve
from flashinfer.predictor import Selection

NOISE = 0.004  # spread of a pre-activation that the predictor does not see, of its own spread
MARGIN = 0.024  # by which the predictor's threshold lies lower: six times the noise
BLOCK = 0.02  # size of what a block adds to the hidden state, of the state's own
WINDOW = 5  # tokens, for which ``fresh`` is meant
SIMULATED_TOKENS = 400
CHUNK_VALUES = 1 << 21


@dataclass
class Code:
    """The code c_t and what neurons make of it."""

    frequencies: np.ndarray  # (pairs,) radians a token
    phases: np.ndarray
    threshold: float  # of a neuron, in spreads of b_i . c_t

    def at(self, positions):
        """positions (T,) -> c_t (T, 2 * pairs) float32 of length 1."""
        angles = positions[:, None] * self.frequencies + self.phases
        code = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return (code / np.sqrt(len(self.frequencies))).astype(np.float32)


def directions(random, n, width):
    """Random directions b_i (n, width) for which b_i . c_t has unit spread over t."""
    b = random.standard_normal((n, width), dtype=np.float32)
    return b * (np.sqrt(width) / np.linalg.norm(b, axis=1, keepdims=True))


def synthesize(
    destination, config, dtype="f16", active=0.03, fresh=0.024, seed=0, progress=None,
    dense_dtype=None,
):  # fmt: skip
    """Write a synthetic bundle of a Hugging Face config; return its calibration.

    active    share of a layer's neurons that fire for a token
    fresh     share of the layer that fires and did not for the last five tokens
    progress  called as progress(bytes_written, bytes_in_all)
    dense_dtype  number format of what is not FFN, where it is to be another than ``dtype``

    Memory: some tens of MB and one square matrix of hidden_size. Raises UserError where the
    shares cannot be had, or the model's activation leaves no neuron silent.
    """
    model = model_config(config)
    if not model.sparse or (model.tied and model.positions != "learned"):
        raise UserError(
            "a synthetic model needs a ReLU and, without learned positions, an untied output head"
        )
    ffn, dense = number_format(dtype), number_format(dense_dtype or dtype)
    maker = _Maker(model, active, fresh, seed)
    calibration = {
        "text": f"synthetic, seed {seed}",
        "tokens": SIMULATED_TOKENS,
        "layers": [maker.record] * model.num_hidden_layers,
    }
    specs = layout(model)
    small = sum(spec.role == SMALL for spec in specs)
    specs[small:small] = predictor_layout(model, [maker.rank] * model.num_hidden_layers)
    tensors = [
        new_tensor(
            spec.name,
            format_of(spec, ffn, dense),
            spec.shape,
            lambda spec=spec: maker.chunks(spec),
        )
        for spec in specs
    ]
    total = sum(tensor.nbytes for tensor in tensors)
    write_bundle(
        destination,
        tensors,
        config,
        source={"synthetic": True, "active": active, "fresh": fresh, "seed": seed},
        calibration=calibration,
        progress=(lambda nbytes: progress(nbytes, total)) if progress else lambda nbytes: None,
    )
    return calibration


def find_code(active, fresh, width, random):
    """The Code whose neurons fire with share ``active``, ``fresh`` of them new at a token."""
    if not 0 < active < 0.5:
        raise UserError(f"an active share of {active} is not between 0 and 0.5")
    pairs = width // 2
    base, phases = random.uniform(0.2, 1, pairs), random.uniform(0, 2 * np.pi, pairs)
    b = directions(random, 4096, width)
    positions = np.arange(SIMULATED_TOKENS)

    def simulate(speed):
        code = Code(base * np.pi * speed, phases, 0.0)
        z = code.at(positions) @ b.T
        code.threshold = float(np.quantile(z, 1 - active))
        fires = z > code.threshold
        recent = np.zeros_like(fires)
        for k in range(1, WINDOW + 1):
            recent[k:] |= fires[:-k]
        return code, (fires & ~recent)[WINDOW:].mean()

    low, high = 0.0, 1.0
    code, most = simulate(1.0)
    if fresh > most * 1.02:
        raise UserError(
            f"a fresh share of {fresh} cannot be had: with {active} active, at most {most:.4f} "
            f"are new after {WINDOW} tokens"
        )
    for _ in range(24):
        speed = (low + high) / 2
        code, found = simulate(speed)
        low, high = (speed, high) if found < fresh else (low, speed)
    return code


class _Maker:
    """Makes every tensor's values, a chunk at a time, the same for the same seed."""

    def __init__(self, model, active, fresh, seed):
        self.model, self.seed = model, seed
        d = self.d = model.hidden_size
        self.width = min(64, d // 4 * 2)
        random = np.random.default_rng([seed, 0])
        self.code = find_code(active, fresh, self.width, random)
        constant = 0 if model.ffn_bias else 1
        q = random.standard_normal((d, self.width + constant))
        q -= q.mean(axis=0)  # the layer norm's centring leaves the subspace alone
        self.reserved = np.linalg.qr(q)[0].astype(np.float32)  # (d, width + constant)
        self.q, self.constant = self.reserved[:, : self.width], self.reserved[:, self.width :]
        self.rank = self.reserved.shape[1]
        self.record = self._record(random)
        # |h|^2 = |token|^2 + |code|^2 + |constant|^2 = 2 or 3, so the norm brings each to this:
        self.code_length = np.sqrt(d / (2 + constant))
        # What a block adds shall be BLOCK of |h|: the spread of its weights' values.
        size = BLOCK * np.sqrt(2 + constant)
        self.attention_spread = size / d
        firing = active * model.d_ffn
        self.down_spread = size / np.sqrt(max(1, firing) * d) / 0.4
        self.tokens_bring_code = model.positions != "learned"

    def _record(self, random):
        """What a calibration would find, by simulating one layer."""
        b = directions(random, self.model.d_ffn, self.width)
        z = self.code.at(np.arange(SIMULATED_TOKENS)) @ b.T
        fires, says = z > self.code.threshold, z > self.code.threshold - MARGIN
        age = np.full(len(b), WINDOWS)
        counts = []
        for row in says:
            age = np.where(row, 0, age + 1)
            counts.append([np.count_nonzero(age < k) for k in range(1, WINDOWS + 1)])
        counts = np.array(counts[WINDOWS:])
        return {
            "active": float(fires.mean()),
            "predicted": float(says.mean()),
            "missed": 0.0,
            "rank": self.rank,
            "window_rows": counts.mean(axis=0).tolist(),
            "window_rows_most": counts.max(axis=0).tolist(),
            "misses": miss_curve((Selection.of_scores(row[None]) for row in says), len(b)),
        }

    def chunks(self, spec):
        """Yield a tensor's values, whole rows at a time, float32."""
        layer, _, name = spec.name.removeprefix("layers.").partition(".")
        if not layer.isdecimal():
            layer, name = "0", spec.name
        random = np.random.default_rng([self.seed, 1, int(layer), *name.encode()])
        if name.endswith("_proj.weight"):
            yield from self._projection(name, spec.shape, random)
        elif name == "ffn.bundles":
            yield from self._bundles(int(layer), spec.shape, random)
        elif name == "predictor.a":
            yield self.reserved.T / self.code_length
        elif name == "predictor.b":
            for _, b in self._directions(int(layer)):
                constant = np.full((len(b), self.constant.shape[1]), self._bias(MARGIN))
                yield np.concatenate([b, constant], axis=1, dtype=np.float32)
        elif name == "predictor.bias" and self.constant.size:
            yield np.zeros(spec.shape, dtype=np.float32)
        elif name in ("predictor.bias", "ffn.gate_bias" if self.model.gated else "ffn.up_bias"):
            margin = MARGIN if name == "predictor.bias" else 0.0
            yield np.full(spec.shape, self._bias(margin), dtype=np.float32)
        elif name == "embed_positions.weight":
            yield self.code.at(np.arange(spec.shape[0])) @ self.q.T
        elif name == "embed_tokens.weight":
            yield from self._embeddings(spec.shape, random)
        elif name == "lm_head.weight" and self.tokens_bring_code:
            for first, n in _steps(spec.shape):  # the token before each
                yield self.code.at(np.arange(first, first + n) - 1) @ self.q.T
        elif name == "final_norm.weight" and not self.tokens_bring_code:
            # Random signs: else a tied head would only repeat the token it was given.
            yield random.choice(np.float32([-1, 1]), spec.shape)
        else:
            yield np.full(spec.shape, float(name.endswith("norm.weight")), dtype=np.float32)

    def _embeddings(self, shape, random):
        first = 0
        for rows in self._normal(shape, random, 1 / np.sqrt(self.d - self.reserved.shape[1])):
            rows -= rows @ self.reserved @ self.reserved.T
            rows += self.constant.sum(axis=1)
            if self.tokens_bring_code:
                rows += self.code.at(np.arange(first, first + len(rows))) @ self.q.T
            first += len(rows)
            yield rows / np.float32(self.model.embedding_scale)

    def _bias(self, margin):
        return margin - self.code.threshold

    def _normal(self, shape, random, spread):
        for _, rows in _steps(shape):
            yield random.standard_normal((rows, shape[1]), dtype=np.float32) * np.float32(spread)

    def _projection(self, name, shape, random):
        if name != "o_proj.weight":
            yield from self._normal(shape, random, 1 / np.sqrt(self.d))
            return
        # Its outputs must stay out of the reserved subspace: (1 - Q Q^T) O.
        o = random.standard_normal(shape, dtype=np.float32) * np.float32(self.attention_spread)
        yield o - self.reserved @ (self.reserved.T @ o)

    def _directions(self, layer):
        """Yield (first, b_i (n, width)): the same for the bundles and for the predictor."""
        random = np.random.default_rng([self.seed, 2, layer])
        step = max(1, CHUNK_VALUES // 8 // self.d)
        for first in range(0, self.model.d_ffn, step):
            n = min(step, self.model.d_ffn - first)
            yield first, directions(random, n, self.width)

    def _bundles(self, layer, shape, random):
        noise = NOISE / np.sqrt(self.d)
        for _, b in self._directions(layer):
            rows = random.standard_normal((len(b), shape[1]), dtype=np.float32)
            first, down = rows[:, : self.d], rows[:, -self.d :]
            first *= np.float32(noise)
            first += (b / self.code_length) @ self.q.T
            first += self._bias(0.0) / self.code_length * self.constant.sum(axis=1)
            if self.model.gated:
                rows[:, self.d : -self.d] /= np.float32(np.sqrt(self.d))
            down *= np.float32(self.down_spread)
            down -= down @ self.reserved @ self.reserved.T
            yield rows


def _steps(shape):
    """Yield (first, rows) of the chunks of a matrix."""
    step = max(1, CHUNK_VALUES // shape[1])
    for first in range(0, shape[0], step):
        yield first, min(step, shape[0] - first)
