"""Chapter 5: a cache that knows the future."""

from collections.abc import Callable, Sequence

import numpy as np

from flashinfer.course.engine import opened, run, text
from flashinfer.course.lesson import Answer, Grade, shown
from flashinfer.formats.arrays import BoolArray, Float64Array
from flashinfer.study.optimal import Future, Recorded, next_use

TITLE = "a cache that knows the future"
ENGINE = "flashinfer/study/optimal.py: next_use"


def worth(uses: BoolArray, now: int) -> Float64Array:
    """Say which neurons are worth keeping, if one knew the text to come.

    uses  (T, d_ffn) bool: which token uses which neuron
    now   the number of the token that is computed now
    Returns (d_ffn,): a number for each neuron. Where slots are short, neurons of the least leave,
    but for those that token ``now`` uses.
    """
    return -next_use(uses, now).astype(np.float64)


solution = worth


def examples(answer: Answer) -> None:
    """Short texts of a few neurons."""
    random = np.random.default_rng(0)
    for _ in range(60):
        tokens, units = int(random.integers(1, 8)), int(random.integers(1, 6))
        uses = random.random((tokens, units)) < 0.4
        for now in range(tokens):
            judged(answer, uses, now)


def judged(answer: Answer, uses: BoolArray, now: int) -> Float64Array:
    """What the answer finds neurons worth. Raises Wrong where one that is used later is worth more
    than one that is used sooner."""
    values: Float64Array = answer.array(
        answer(uses.copy(), now), np.float64, "what is given", (uses.shape[1],)
    )
    when = next_use(uses, now)
    order = np.argsort(when, kind="stable")
    # From sooner to later: none may be worth more than, or as much as, one used strictly sooner.
    least_before = np.minimum.accumulate(values[order])
    for at in range(1, len(order)):
        sooner = order[:at][when[order[:at]] < when[order[at]]]
        if not len(sooner) or values[order[at]] < least_before[len(sooner) - 1]:
            continue
        first, second = int(sooner[np.argmin(values[sooner])]), int(order[at])
        raise answer.wrong(
            f"after token {now} {_use(uses, first, now)} and {_use(uses, second, now)}, but they "
            f"are worth {values[first]:g} and {values[second]:g}"
            + (f"; uses are {shown(uses.astype(int))}" if uses.size <= 40 else "")
        )
    return values


def _use(uses: BoolArray, unit: int, now: int) -> str:
    later = np.flatnonzero(uses[now + 1 :, unit])
    if not len(later):
        return f"neuron {unit} is never used again"
    return f"neuron {unit} is used next by token {now + 1 + later[0]}"


class Foreseen(Future):
    """The future, as the answer weighs it."""

    def __init__(self, uses: BoolArray, answer: Answer) -> None:
        super().__init__(uses)
        self.answer = answer

    def worth_after(self, now: int) -> Float64Array:
        """What each neuron is worth keeping (d_ffn,)."""
        return judged(self.answer, self.uses, now)


def grades(answer: Answer, progress: Callable[[float], None]) -> list[Grade]:
    """The demo model, whose caches are told the future by the answer."""
    ids = text()
    with opened() as model:
        caches = [layer.feed_forward.store.cache for layer in model.layers]
        recorded = [Recorded(len(cache.slot_of)) for cache in caches]
        for cache, priority in zip(caches, recorded, strict=True):
            cache.priority = priority
        usual = run(model, ids)
    own = _run([Future(each.uses) for each in recorded], ids)
    got = _run([Foreseen(each.uses, answer) for each in recorded], ids, progress)
    return [
        Grade("bits of the logits", got[0], usual.digest),
        Grade("neurons read a token", got[1], own[1], own[1]),
    ]


def _run(
    priorities: Sequence[Future],
    ids: list[int],
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[str, float]:
    """(digest of the logits, neurons read a token), with caches that are told the future."""
    with opened() as model:
        caches = [layer.feed_forward.store.cache for layer in model.layers]
        for cache, priority in zip(caches, priorities, strict=True):
            cache.priority = priority
        digest = run(model, ids, progress).digest
        return digest, sum(cache.misses for cache in caches) / len(ids)
