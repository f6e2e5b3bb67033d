"""Chapter 6: read before the layer's turn."""

from collections.abc import Callable
from typing import Any

import numpy as np

from flashinfer.course.engine import Run, opened, run, text
from flashinfer.course.lesson import Answer, Grade, shown
from flashinfer.formats.arrays import Float32Array, Int32Array
from flashinfer.kernels import positive
from flashinfer.paper.neuron_cache import NeuronCache
from flashinfer.paper.predictor import Predictor
from flashinfer.study.expected import BASE

TITLE = "read before the layer's turn"
ENGINE = "flashinfer/paper/predictor.py: Predictor.early"
MEMORY = BASE + (28 << 20)  # enough for what the next layer will probably need
MORE = 1.02  # times as many late, or useless, reads as with the engine's own function, or fewer


def guess(scores: Float32Array) -> Int32Array:
    """Say which neurons to read for the next layer while this layer is still computed.

    scores  (d_ffn,): what the next layer's predictor says of the hidden state as it is now, before
            this layer has added anything; with the final one it will name those whose score is
            above 0
    Returns the neurons (n,), ascending: those that are not in DRAM are read at once, and the others
    stay there. A neuron that is not named, and yet needed, is read late; one that is named, and not
    needed, is read for nothing.
    """
    return positive(scores)


solution = guess


def examples(answer: Answer) -> None:
    """Scores of small layers; that of a neuron may be exactly 0."""
    random = np.random.default_rng(0)
    for units in (1, 3, 8):
        for _ in range(20):
            judged(answer, random.integers(-3, 4, size=units).astype(np.float32))


def judged(answer: Answer, scores: Float32Array) -> Int32Array:
    """The neurons that the answer names. Raises Wrong where they are no neurons."""
    given = answer(scores.copy())
    ids: Int32Array = answer.array(given, np.int32, "what is given")
    if len(ids) and (ids.min() < 0 or ids.max() >= len(scores)):
        raise answer.wrong(
            f"of {len(scores)} neurons it names {shown(ids)}; they are numbered from 0"
        )
    if (np.diff(ids) <= 0).any():
        raise answer.wrong(f"{shown(ids)} must be ascending, each neuron once")
    return ids


class Guessing:
    """A layer's predictor, whose early guesses are those of the answer."""

    def __init__(self, predictor: Predictor, answer: Answer) -> None:
        self.predictor, self.answer = predictor, answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.predictor, name)

    def early(
        self, x: Float32Array, residual: Float32Array | None, share: float = 1.0
    ) -> tuple[Int32Array, Int32Array]:
        """(neurons worth reading, neurons worth keeping): the same."""
        ids = judged(self.answer, self.predictor.scores(x, residual)[0])
        return ids, ids


def grades(answer: Answer, progress: Callable[[float], None]) -> list[Grade]:
    """The demo model, which reads early what the answer names."""
    ids = text()
    with opened(memory=MEMORY) as model:
        none = run(model, ids)
    _, own_late, own_useless = counted(ids, None)
    got, late, useless = counted(ids, answer, progress)
    return [
        Grade("bits of the logits", got.digest, none.digest),
        Grade("neurons read late, a token", late, own_late, MORE * own_late),
        Grade("neurons read for nothing, a token", useless, own_useless, MORE * own_useless),
    ]


def counted(
    ids: list[int],
    answer: Answer | None,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Run, float, float]:
    """(the Run, neurons read late, neurons read for nothing), with the answer's guesses."""
    with opened(prefetch=True, memory=MEMORY) as model:
        caches: list[NeuronCache] = []
        for layer in model.layers:
            ffn = layer.feed_forward
            caches.append(ffn.store.cache)
            if answer is not None and isinstance(ffn.predictor, Predictor):
                ffn.predictor = Guessing(ffn.predictor, answer)
        result = run(model, ids, progress)
        late = sum(cache.misses - cache.right_guesses for cache in caches)
        useless = sum(cache.guesses - cache.right_guesses for cache in caches)
        return result, late / len(ids), useless / len(ids)
