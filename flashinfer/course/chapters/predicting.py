"""Chapter 3: a predictor by SVD."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from flashinfer.calibration.predictor_training import svd_predictors
from flashinfer.course.engine import DEMO, DEVICE, opened, run, text
from flashinfer.course.lesson import Answer, Grade, shown
from flashinfer.formats.arrays import BoolArray, Float32Array
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.formats.number_formats import FORMATS
from flashinfer.paper.predictor import Predictor
from flashinfer.plan.options import Options
from flashinfer.plan.profile import boards, load
from flashinfer.study.activity import Sample, Study, activity
from flashinfer.transformer.weights import Resident

TITLE = "a predictor by SVD"
ENGINE = "flashinfer/calibration/predictor_training.py: svd_predictors"
RANK = 64
MARGIN = 1e-3  # of the spread of scores: rounding in the engine is far less
MADE_ON, FURTHER = 256, 512  # tokens that a predictor is made on, and tried on
MISSED = 0.1  # of the neurons that fire on a text that the predictor was not made on
MORE = 1.05  # times as many neurons as the engine's own predictor names, or fewer


def predictor(
    up: Float32Array, bias: Float32Array, x: Float32Array, rank: int
) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Predict which neurons fire from far fewer weights than the up projection has.

    up, bias  (d_ffn, d_model), (d_ffn,): neuron i fires where up[i] . x + bias[i] > 0
    x         (T, d_model): inputs of the layer, those of a text
    rank      of the predictor
    Returns (a (rank, d_model), b (d_ffn, rank), c (d_ffn,)): neuron i is predicted to fire where
    (b @ (a @ x) + c)[i] > 0. No neuron that fires for one of these inputs may be missed: then the
    logits keep their bits, since a silent neuron adds nothing.
    """
    *_, maps = svd_predictors(x, lambda: [(0, up)], bias, (rank,), unlike=0.0)
    scores = x @ maps.a.T @ maps.b.T + maps.bias  # (T, d_ffn)
    fires = x @ up.T + bias > 0
    lowest = scores[fires].min(initial=np.inf)
    margin = MARGIN * float(scores.std())
    return maps.a, maps.b, maps.bias - np.float32(min(lowest, 0) - margin)


solution = predictor


class Layer(NamedTuple):
    """A layer of the demo model, and its inputs by the text."""

    up: Float32Array  # (d_ffn, d_model)
    bias: Float32Array  # (d_ffn,)
    x: Float32Array  # (T, d_model)


class Maps(NamedTuple):
    """What an answer gave."""

    a: Float32Array
    b: Float32Array
    c: Float32Array

    def says(self, x: Float32Array) -> BoolArray:
        """Which neurons are predicted to fire, (T, d_ffn)."""
        says: BoolArray = x @ self.a.T @ self.b.T + self.c > 0
        return says


def examples(answer: Answer) -> None:
    """A small layer whose inputs lie near a few directions."""
    random = np.random.default_rng(0)
    for width, neurons, tokens, rank in ((6, 10, 20, 2), (8, 5, 40, 3)):
        up = random.normal(size=(neurons, width)).astype(np.float32)
        x = random.normal(size=(tokens, rank)) @ random.normal(size=(rank, width))
        bias = random.normal(size=neurons).astype(np.float32)
        judged(answer, Layer(up, bias, x.astype(np.float32)), rank)


def judged(answer: Answer, layer: Layer, rank: int) -> Maps:
    """The answer's predictor. Raises Wrong where it has not the shapes, or misses a neuron."""
    given = answer(layer.up.copy(), layer.bias.copy(), layer.x.copy(), rank)
    if not isinstance(given, tuple) or len(given) != 3:
        raise answer.wrong(f"gave {shown(given)}; (a, b, c) is wanted")
    neurons, width = layer.up.shape
    shapes = {"a": (rank, width), "b": (neurons, rank), "c": (neurons,)}
    maps = Maps(*(answer.array(part, np.float32, name, shape)
                  for part, (name, shape) in zip(given, shapes.items(), strict=True)))  # fmt: skip
    fires = layer.x @ layer.up.T + layer.bias > 0
    missed = np.argwhere(fires & ~maps.says(layer.x))
    if len(missed):
        raise answer.wrong(
            f"misses {len(missed)} of {np.count_nonzero(fires)} firings of a layer {layer.up.shape}"
            f", first neuron {missed[0][1]} for input {missed[0][0]}; c must be large enough for "
            "the firing neuron of the lowest score"
        )
    return maps


def grades(answer: Answer, progress: Callable[[float], None]) -> list[Grade]:
    """The demo model, its neurons predicted by the answer, on the text that it was made on; and
    the answer on another part of the text."""
    ids = text()
    layers, others = layers_of(text(0, MADE_ON)), layers_of(text(1024, FURTHER))
    with opened(neurons="dense") as model:
        whole = run(model, ids)
    own = [Maps(*predictor(*layer, RANK)) for layer in layers]
    got = [judged(answer, layer, RANK) for layer in layers]
    with opened() as model:
        for layer, maps in zip(model.layers, got, strict=True):
            layer.feed_forward.predictor = _in_engine(maps)
        digest = run(model, ids, progress).digest
    most = MORE * _named(own, layers)
    missed, own_missed = (share_missed(maps, others) for maps in (got, own))
    return [
        Grade("bits of the logits", digest, whole.digest),
        Grade("neurons predicted a token", _named(got, layers), _named(own, layers), most),
        Grade("of a further text missed, %", 100 * missed, 100 * own_missed, 100 * MISSED),
    ]


def layers_of(ids: list[int]) -> list[Layer]:
    """The demo model's layers, with their inputs by a text."""
    options = Options(draft="off", context=len(ids))
    study = Study(DEMO, [Sample("text", ids)], options, load(boards()[DEVICE]))
    return list(_with_inputs(study))


def _with_inputs(study: Study) -> Iterator[Layer]:
    for used in activity(study, study.samples[0], "text", inputs=True):
        if used.ffn is None or used.x is None:
            continue
        store, neurons = used.ffn.store, used.ffn.neurons
        up = np.concatenate([
            neurons.format.decode(memory[starts[:, None] + np.arange(neurons.width)])
            for _, _, memory, starts in store.tiles()
        ])  # fmt: skip
        bias = neurons.biases["up"]
        yield Layer(up, np.zeros(len(up), np.float32) if bias is None else bias, used.x.copy())


def _in_engine(maps: Maps) -> Predictor:
    """The predictor as the engine asks it, its matrices in 32 bits."""
    return Predictor(_resident("a", maps.a), _resident("b", maps.b), maps.c)


def _resident(name: str, matrix: Float32Array) -> Resident:
    rows, columns = matrix.shape
    tensor = StoredTensor(name, 0, rows, columns, FORMATS["f32"])
    return Resident(tensor, np.ascontiguousarray(matrix).view(np.uint8))


def _named(predictors: list[Maps], layers: list[Layer]) -> float:
    """Neurons that are predicted a token, of all layers."""
    return sum(float(m.says(layer.x).sum(axis=1).mean())
               for m, layer in zip(predictors, layers, strict=True))  # fmt: skip


def share_missed(predictors: list[Maps], layers: list[Layer]) -> float:
    """The share of the neurons that fire which are not predicted."""
    fired = missed = 0
    for maps, (up, bias, x) in zip(predictors, layers, strict=True):
        fires = x @ up.T + bias > 0
        fired += np.count_nonzero(fires)
        missed += np.count_nonzero(fires & ~maps.says(x))
    return float(missed / fired)
