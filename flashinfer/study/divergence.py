"""How far one model's predictions of a text are from another's: perplexities and KL divergence.

The figures and their standard errors are those of llama.cpp's perplexity tool.
"""

import math
from dataclasses import dataclass

import numpy as np

from flashinfer.formats.arrays import Float32Array, Float64Array, Int64Array
from flashinfer.study.perplexity import log_softmax

LEAST_REST = 2.0**-24  # of probability beside the named tokens; below lies the rounding of float32


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Of a text: e to the mean negative log-likelihood of a token.

    nats_error, perplexity_error  standard errors; None of a single token
    """

    nats_per_token: float
    nats_error: float | None
    perplexity: float
    perplexity_error: float | None


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Of a model's predictions from a base's, over the tokens of a text.

    log_ratio  mean ln(p_base(token) / p(token)) of the text's tokens: the logarithm of the
               perplexity over the base's; None where not every token's probability is known
    kl_...     KL(base || model) of each prediction, in nats: its mean, quantiles and largest
    same_top   share of the tokens after which both name the same token as the likeliest
    ..._error  standard errors; None of a single token
    """

    log_ratio: float | None
    log_ratio_error: float | None
    kl_mean: float
    kl_mean_error: float | None
    kl_median: float
    kl_90: float
    kl_99: float
    kl_99_9: float
    kl_largest: float
    same_top: float
    same_top_error: float | None


class Comparison:
    """Gathers, token by token, what a base and a model predict; both are compared at the end.

    Of each token three numbers are kept, and no logits.
    """

    def __init__(self) -> None:
        self.base_nats: list[float] = []
        self.nats: list[float] = []
        self.kl: list[float] = []
        self.same: list[bool] = []

    def add(self, base: Float32Array, model: Float32Array | Float64Array, token: int) -> None:
        """Logits of the base and of the model, (vocab_size,) each, finite, and what follows."""
        p, q = log_softmax(base), log_softmax(model)
        # Rounding may make the sum a little less than 0, which KL divergence never is.
        kl = max(0.0, float(np.exp(p) @ (p - q)))
        self._add(p, float(q[token]), token, kl, int(q.argmax()))

    def add_named(
        self, base: Float32Array, ids: Int64Array, logs: Float64Array, token: int
    ) -> None:
        """As ``add``, where of the model only some tokens' log-probabilities are known.

        ids, logs  (n,) each: the tokens that are named, and their logarithms
        All other tokens count as one. KL divergence is a lower bound then: telling tokens apart
        never lowers it.
        """
        p = log_softmax(base)
        of_base, rest = np.exp(p), np.ones(len(p), dtype=bool)
        rest[ids] = False
        kl = float(of_base[ids] @ (p[ids] - logs))
        base_rest = float(of_base[rest].sum())
        if base_rest > 0:
            model_rest = max(1 - float(np.exp(logs).sum()), LEAST_REST)
            kl += base_rest * (math.log(base_rest) - math.log(model_rest))
        known = logs[ids == token]
        top = int(ids[logs.argmax()]) if len(ids) else -1
        self._add(p, float(known[0]) if len(known) else math.nan, token, max(0.0, kl), top)

    def _add(self, p: Float64Array, log: float, token: int, kl: float, top: int) -> None:
        self.base_nats.append(-float(p[token]))
        self.nats.append(-log)
        self.kl.append(kl)
        self.same.append(int(p.argmax()) == top)

    @property
    def base(self) -> Perplexity:
        """The base's Perplexity."""
        return perplexity_of(self.base_nats)

    @property
    def model(self) -> Perplexity | None:
        """The model's Perplexity; None where not every token's probability is known."""
        return None if np.isnan(self.nats).any() else perplexity_of(self.nats)

    def distance(self) -> Distance:
        """The Distance over all tokens given."""
        kl, ratio, error = np.array(self.kl), np.array(self.nats) - np.array(self.base_nats), None
        known = not np.isnan(ratio).any()
        if known:
            error = standard_error(ratio)
        return Distance(
            log_ratio=float(ratio.mean()) if known else None,
            log_ratio_error=error,
            kl_mean=float(kl.mean()),
            kl_mean_error=standard_error(kl),
            kl_median=float(np.median(kl)),
            kl_90=float(np.quantile(kl, 0.9)),
            kl_99=float(np.quantile(kl, 0.99)),
            kl_99_9=float(np.quantile(kl, 0.999)),
            kl_largest=float(kl.max()),
            same_top=float(np.mean(self.same)),
            same_top_error=standard_error(np.array(self.same, dtype=np.float64)),
        )


def perplexity_of(nats: list[float]) -> Perplexity:
    """The Perplexity of tokens' negative log-likelihoods."""
    mean, error = float(np.mean(nats)), standard_error(np.array(nats))
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(mean))  # infinite where float64 ends
    return Perplexity(
        nats_per_token=mean,
        nats_error=error,
        perplexity=perplexity,
        perplexity_error=None if error is None else perplexity * error,
    )


def standard_error(values: Float64Array) -> float | None:
    """Of the mean of values (n,): s / sqrt(n), where s**2 is over n - 1; None of a single value."""
    n = len(values)
    return float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None
