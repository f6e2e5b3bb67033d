"""What ``flashinfer evaluate`` prints for people."""

from flashinfer.study.against import Against
from flashinfer.study.choices import Accuracy
from flashinfer.study.divergence import Distance, Perplexity
from flashinfer.study.modes import Modes


def modes_lines(found: Modes) -> list[str]:
    """The modes side by side, and the errors of each layer's predictor."""
    lines = [f"over {found.tokens} tokens, each figure with its standard error:"]
    for result in found.results:
        lines.append(f"{result.mode}: {_perplexity(result.perplexity)}")
        if result.distance is not None:
            lines += _distance(result.distance, found.results[0].mode)
    if found.left_out is not None:
        lines.append(f"no other modes: {found.left_out}")
    for number, layer in enumerate(found.layers):
        lines.append(
            f"layer {number}: {100 * layer.active:.2f} % of the neurons fire, of which the "
            f"predictor misses {100 * layer.missed:.2f} %; {100 * layer.needless:.2f} % of those "
            "predicted do not fire"
        )
    return lines


def against_lines(found: Against, mode: str, name: str) -> list[str]:
    """A model beside another engine's logits, which have a ``name``."""
    lines = [f"over {found.tokens} tokens, each figure with its standard error:"]
    lines.append(f"this model, {mode}: {_perplexity(found.base)}")
    unknown = "perplexity unknown, as the server did not name every token of the text"
    lines.append(f"{name}: {unknown if found.other is None else _perplexity(found.other)}")
    lines += _distance(found.distance, "this model")
    if found.named is not None:
        lines.append(
            f"  the server named {found.named:.1f} tokens at each position, and the others count "
            "as one: KL divergence is at least this"
        )
    return lines


def accuracy_line(found: Accuracy, mode: str) -> str:
    """The share of questions that were answered right."""
    return (
        f"{mode}: accuracy {_share(found.accuracy, found.accuracy_error)}, by likelihood for each "
        f"byte {_share(found.normalised, found.normalised_error)}, of {found.questions} questions"
    )


def _perplexity(found: Perplexity) -> str:
    return f"perplexity {found.perplexity:.4f}{_error(found.perplexity_error, '.4f')} a token"


def _distance(found: Distance, base: str) -> list[str]:
    lines = [
        f"  KL divergence from {base}: mean {found.kl_mean:.3g}"
        f"{_error(found.kl_mean_error, '.1g')} nats, median {found.kl_median:.3g}, "
        f"90 % {found.kl_90:.3g}, 99 % {found.kl_99:.3g}, 99.9 % {found.kl_99_9:.3g}, "
        f"largest {found.kl_largest:.3g}",
        f"  the likeliest token is the same: {_share(found.same_top, found.same_top_error)}",
    ]
    if found.log_ratio is not None:
        lines.append(
            f"  ln(perplexity / that of {base}): {found.log_ratio:.3g}"
            f"{_error(found.log_ratio_error, '.1g')}"
        )
    return lines


def _share(value: float, error: float | None) -> str:
    return f"{100 * value:.2f}{_error(None if error is None else 100 * error, '.2f')} %"


def _error(error: float | None, form: str) -> str:
    return "" if error is None else f" ± {error:{form}}"
