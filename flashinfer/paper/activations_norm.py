"""A norm of all of a token's activations, where these come in parts."""

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float32Array, Float64Array, Int32Array
from flashinfer.formats.layers.norm import NormConfig

TOGETHER = 8192  # squares that are summed at a time


class ActivationsNorm:
    """down(weight * a / rms(a)), computed as down(weight * a) / rms(a).

    So the down projection of some neurons need not wait for the activations of the others: each is
    weighted as it comes, and the sum is divided at the end. Neurons that are silent, or not read,
    count as 0 among the ``width`` of which rms(a) is the root of the mean square.

    weight   (neurons,) float32, or None
    squares  (T,) float64: the sums of squares so far. Each is made in ascending order of the
             neurons, one after the other, so that it has the same bits whichever parts they come in
    """

    def __init__(self, config: NormConfig, weight: Float32Array | None, width: int) -> None:
        self.config, self.weight, self.width = config, weight, width
        self.squares: Float64Array = np.zeros(0)

    def begin(self, n_tokens: int) -> None:
        """The tokens that follow are other ones, so many."""
        self.squares = np.zeros(n_tokens)

    def take(
        self,
        a: Float32Array,
        neurons: AnyArray,
        indptr: Int32Array | None = None,
        tokens: Int32Array | None = None,
    ) -> Float32Array:
        """Count the activations of ``neurons``, which follow those counted so far, and weight them
        in place; a: as ``Neurons.activations`` gives it. Returns a."""
        if indptr is not None:
            np.add.at(self.squares, tokens, np.square(a, dtype=np.float64))
        else:
            step = max(1, TOGETHER // max(1, a.shape[1]))
            for first in range(0, len(a), step):
                squares = np.square(a[first : first + step], dtype=np.float64)  # (<= step, T)
                squares[0] += self.squares
                # Not ``sum``, which adds in pairs.
                self.squares = np.add.accumulate(squares, axis=0)[-1]
        return self.weigh(a, neurons, indptr)

    def weigh(
        self, a: Float32Array, neurons: AnyArray, indptr: Int32Array | None = None
    ) -> Float32Array:
        """Weight the activations of ``neurons`` in place; the arguments as in ``take``."""
        if self.weight is not None:
            weights = self.weight[neurons]
            a *= weights[:, None] if indptr is None else np.repeat(weights, np.diff(indptr))
        return a

    def factors(self) -> Float32Array:
        """1 / rms(a) of each token, (T,), when all of its activations are counted."""
        mean = self.squares / self.width
        return (1 / np.sqrt(mean + self.config.epsilon)).astype(np.float32)

    def divide(self, y: Float32Array) -> None:
        """y (T, d_model), the down projection of all weighted activations, is divided by rms(a)."""
        y *= self.factors()[:, None]
