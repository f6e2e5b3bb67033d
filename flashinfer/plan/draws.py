"""How many experts a token misses in a layer, by chance: for the cost model."""

import math

import numpy as np

SAMPLES = 8  # tokens


class Draws:
    """Numbers of experts of one of SAMPLES tokens in a layer, by chance; sample: None, their means.

    Of the tokens each is in another part of the distribution.
    """

    def __init__(self, layer: int, sample: int | None) -> None:
        self.sample, self.random = sample, np.random.default_rng(layer)

    def of(self, most: float, mean: float) -> float:
        """Some of ``most``, each as likely as the others, ``mean`` on average."""
        if self.sample is None:
            return mean
        parts, within = self.random.permutation(SAMPLES), self.random.random(SAMPLES)
        chance = (parts[self.sample] + within[self.sample]) / SAMPLES
        n, number = math.ceil(most), 0
        p = min(1.0, mean / max(n, 1))
        below = likely = (1 - p) ** n
        while chance > below and number < n:
            likely *= (n - number) / (number + 1) * p / max(1 - p, 1e-12)
            number += 1
            below += likely
        return float(number)
