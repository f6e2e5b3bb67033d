"""Chapter 1: bundle a layer."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.course.engine import DEMO, opened, run, text
from flashinfer.course.lesson import Answer, Grade, shown
from flashinfer.formats.arrays import AnyArray
from flashinfer.formats.bundle.layout import bundled
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.bundle.writer import NewTensor, stored_tensors, write_bundle

TITLE = "bundle a layer"
ENGINE = "formats/bundle/layout.py: bundled"


def bundle(up: AnyArray, down: AnyArray) -> AnyArray:
    """Lay out a feed-forward layer so that one read brings all of a neuron.

    up    (d_ffn, d_model): its row i is what neuron i multiplies its input with
    down  (d_model, d_ffn): its column i is what neuron i adds to the output
    Returns (d_ffn, 2 * d_model): all of neuron i in row i, first its part of up, then its part of
    down. The values and their dtype stay as they are.
    """
    return bundled([up, down.T])


solution = bundle


def examples(answer: Answer) -> None:
    """Small layers, square ones among them."""
    for neurons, width in ((2, 2), (3, 2), (4, 4), (1, 3), (8, 5)):
        up = np.arange(neurons * width, dtype=np.float16).reshape(neurons, width)
        down = 100 + np.arange(neurons * width, dtype=np.float16).reshape(width, neurons)
        judged(answer, up, down)


def judged(answer: Answer, up: AnyArray, down: AnyArray) -> AnyArray:
    """The layer as the answer lays it out. Raises Wrong where that is not what was asked for."""
    given, expected = answer(up.copy(), down.copy()), bundle(up, down)
    if not isinstance(given, np.ndarray) or given.shape != expected.shape:
        what = f"an array {given.shape}" if isinstance(given, np.ndarray) else shown(given)
        raise answer.wrong(
            f"gave {what} for up {up.shape} and down {down.shape}; an array {expected.shape} is "
            "wanted: a row for each neuron"
        )
    if given.dtype != up.dtype:
        raise answer.wrong(f"gave {given.dtype}; the file holds {up.dtype}, bit for bit")
    wrong = np.flatnonzero((given != expected).any(axis=1))
    if wrong.size:
        i, width = int(wrong[0]), up.shape[1]
        half = "first" if (given[i, :width] != expected[i, :width]).any() else "second"
        right = f"row {i} of up" if half == "first" else f"column {i} of down"
        part = slice(0, width) if half == "first" else slice(width, None)
        raise answer.wrong(
            f"row {i} is not all of neuron {i}: its {half} half must be {right}, "
            f"{shown(expected[i, part])}, and is {shown(given[i, part])}"
        )
    return given


def grades(answer: Answer, progress: Callable[[float], None]) -> list[Grade]:
    """The demo model, written anew with its layers as the answer lays them out."""
    ids = text()
    with opened() as model:
        own = run(model, ids)
    with tempfile.TemporaryDirectory(prefix="flashinfer-check-") as folder:
        path = Path(folder) / "answer.flash"
        _write(path, answer)
        with opened(path) as model:
            got = run(model, ids, progress)
    return [
        Grade("bits of the logits", got.digest, own.digest),
        Grade("reads a token", got.reads, own.reads, own.reads),
    ]


def _write(path: Path, answer: Answer) -> None:
    """The demo model as a new file, each layer bundled by the answer."""
    with Bundle(DEMO) as source:
        layers = {f"layers.{i}.ffn.bundles": i for i in range(len(source.config.layers))}

        def tensor(stored: NewTensor) -> NewTensor:
            if stored.name not in layers:
                return stored
            return replace(stored, chunks=lambda: [_bundles(source, layers[stored.name], answer)])

        tensors = [tensor(stored) for stored in stored_tensors(source)]
        write_bundle(path, tensors, source.hf_config, source.source, source.calibration)


def _bundles(source: Bundle, layer: int, answer: Answer) -> Any:
    """A layer's bundles as bytes, laid out by the answer."""
    stored = source.bundles(layer)
    raw = b"".join(bytes(part) for part in source.file.chunks(stored.offset, stored.nbytes))
    rows = np.frombuffer(raw, dtype=np.float16).reshape(stored.rows, stored.columns)
    width = stored.columns // 2
    given = judged(answer, rows[:, :width].copy(), np.ascontiguousarray(rows[:, width:].T))
    return np.ascontiguousarray(given).view(np.uint8)
