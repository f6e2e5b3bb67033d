"""From logits to the next token, in llama.cpp's order: top-k, then top-p, then temperature."""

import numpy as np

from flashinfer.formats.arrays import Float32Array, Float64Array, Int64Array
from flashinfer.formats.errors import UserError
from flashinfer.kernels.fixed_math import exp


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens, with every NumPy.

    temperature  divides the logits; 0: the likeliest token, always
    top_k        keep the k likeliest tokens; 0: all
    top_p        keep the fewest likeliest tokens whose probabilities add up to p; 1: all
    Raises UserError where a setting is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        seed: int | None = None,
    ) -> None:
        if not temperature >= 0 or not np.isfinite(temperature):
            raise UserError(f"temperature {temperature} is not 0 or more")
        if top_k < 0:
            raise UserError(f"top-k {top_k} is not 0 or more")
        if seed is not None and seed < 0:
            raise UserError(f"seed {seed} is not 0 or more")
        if not 0 < top_p <= 1:
            raise UserError(f"top-p {top_p} is not above 0 and at most 1")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        # The raw numbers of a bit generator never change, those of NumPy's distributions may.
        self.random = np.random.PCG64(seed)

    def __call__(self, logits: Float32Array) -> int:
        """logits (vocab_size,) -> a token id. Raises UserError where a logit is not finite."""
        refuse_infinite(logits)
        if self.temperature == 0:
            return int(np.argmax(logits))
        ids, probabilities = self.probabilities(logits)
        sums = np.cumsum(probabilities)
        return int(ids[np.searchsorted(sums / sums[-1], self.uniform(), side="right")])

    def probabilities(self, logits: Float32Array) -> tuple[Int64Array, Float64Array]:
        """logits (vocab_size,), finite -> the tokens that may be drawn with a temperature above 0,
        likeliest first (n,), and the probability of each (n,) float64."""
        k = self.top_k if 0 < self.top_k < len(logits) else len(logits)
        least = np.partition(logits, len(logits) - k)[len(logits) - k]
        ids = np.flatnonzero(logits >= least)
        ids = ids[np.argsort(-logits[ids], kind="stable")][:k]  # likeliest first, ties by id
        likely = logits[ids].astype(np.float64)
        weights = exp(likely - likely[0])
        before = np.cumsum(weights) - weights  # the weight of all likelier tokens
        kept = before < self.top_p * weights.sum()
        with np.errstate(over="ignore"):  # a tiny temperature gives -inf, and thus no weight
            weights = exp((likely[kept] - likely[0]) / self.temperature)
        return ids[kept], weights / weights.sum()

    def copy(self) -> "Sampler":
        """A sampler that will draw with the same random numbers."""
        other = Sampler(self.temperature, self.top_k, self.top_p, 0)
        other.random.state = self.random.state
        return other

    def uniform(self) -> float:
        """The next random number, at least 0 and below 1: the upper 53 bits of 64."""
        return (int(self.random.random_raw()) >> 11) * 2.0**-53


def refuse_infinite(logits: Float32Array, after: int | None = None) -> None:
    """Raise UserError where one of the logits (vocab_size,) is not finite.

    after  the number in the text of the token that gave these logits, for the message
    """
    if not np.isfinite(logits).all():
        token = int(np.flatnonzero(~np.isfinite(logits))[0])
        where = "" if after is None else f" after token {after} of the text"
        raise UserError(
            f"the model gives no finite logits{where}: that of token id {token} is {logits[token]}"
        )
