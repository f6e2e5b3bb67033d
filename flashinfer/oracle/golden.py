"""Goldens: what a run has to be, with the noise that an engine may have, in some kilobytes.

A golden is a trace of summaries, computed in float64 from the tokens on, that holds the noise of
each sampled element as well. It judges another engine's trace without the model, such as on a
machine that the model does not fit.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.oracle.arithmetic import Arithmetic
from flashinfer.oracle.compare import NOT_JUDGED, Comparison, Operation, judged
from flashinfer.oracle.known import Known
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.oracle.recorded import refuse_text
from flashinfer.oracle.replay import Replay
from flashinfer.oracle.summary import sampled, summary_of
from flashinfer.oracle.trace_file import (
    MOMENTS,
    NOISE,
    SUMMARIES,
    Trace,
    TraceWriter,
    trace_metadata,
)
from flashinfer.transformer.values import Value, values_of

# Choices have no noise of their own, and each engine names them in an order of its own.
LEFT_OUT = (*NOT_JUDGED, "choices", "choice_weights")


def write_golden(
    weights: ModelWeights,
    tokens: Sequence[int],
    how: Arithmetic,
    path: Path | str,
    progress: Progress = no_progress,
) -> None:
    """Compute the run of ``tokens`` and write it to ``path``, with the noise of an engine of the
    Arithmetic ``how``.

    progress  is told the values done, as "compare"
    Memory: a layer's weights in float64, and 512 MiB. Raises UserError where a token is not in the
    vocabulary, the text is longer than the model's context, or a value is not finite.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    refuse_text(weights, ids, "--tokens")
    values = [v for v in values_of(weights.config, weights.naming) if v.key not in LEFT_OUT]
    run = Replay(weights, {}, ids, np.arange(len(ids)), how)
    listed, moments, samples, noises = [], [], [], []  # of each value
    for number, value in enumerate(values):
        if value.layer is not None:
            run.forget(value.layer)
        found = run.of(value.layer, value.key)
        if not np.isfinite(found.value).all():
            raise UserError(f"{weights.path}: {value.name} is not finite")
        array = found.value.astype(np.float32)
        summary, where = summary_of(value.name, array), sampled(value.name, array.size)
        listed.append([value.name, value.dtype, [len(ids), *value.shape], summary.digest])
        moments.append(summary.moments)
        samples.append(found.value.reshape(-1)[where])
        noises.append(found.spread.reshape(-1)[where])
        progress("compare", number + 1, len(values))
    metadata = trace_metadata(
        "the oracle, in float64", weights.hf_config, ids, np.arange(len(ids)), arithmetic=how.name
    )
    metadata[SUMMARIES] = json.dumps(listed, separators=(",", ":"))
    parts = {"moments": moments, "sample": samples, NOISE: noises}
    arrays = {name: np.array(rows) for name, rows in parts.items()}
    tensors = [Value(name, None, name, a.shape[1:], "F64") for name, a in arrays.items()]
    with TraceWriter(path, tensors, len(values), metadata) as writer:
        for tensor in tensors:
            writer.rows(tensor, 0, arrays[tensor.name])


def compare_with_golden(golden: Trace, other: Trace) -> Comparison:
    """Judge ``other`` by the sampled elements of ``golden``, along the run as a whole.

    Raises FormatError where they are not of the same tokens, or share no values.
    """
    if not np.array_equal(golden.tokens, other.tokens) or len(other.positions) != len(
        golden.tokens
    ):
        raise FormatError(f"{other.path}: is not a trace of all tokens of {golden.path}")
    if other.mode == "predicted":
        raise FormatError(
            f"{other.path}: is a trace of predicted neurons only; see --neurons dense"
        )
    held = set(other.names)
    operations: list[Operation] = []
    for name in golden.names:
        if name not in held:
            operations.append(Operation(name, None, name, "not recorded"))
            continue
        with np.errstate(all="ignore"):  # a trace may hold NaN, and any float64
            operations.append(_judge(golden, other, name))
    found = Comparison(
        other.engine, golden.arithmetic, False, tuple(other.positions.tolist()), tuple(operations)
    )
    if not found.judged:
        raise FormatError(f"{other.path}: shares no value with {golden.path}")
    return found


def _judge(golden: Trace, other: Trace, name: str) -> Operation:
    shape, _ = (golden.summaries or {})[name]
    size, each = math.prod(shape), math.prod(shape[1:])
    where = sampled(name, size)
    finite = True
    if other.summaries is not None:
        counts = dict(zip(MOMENTS, other.summary(name, "moments"), strict=True))
        finite = not (counts["nan"] or counts["infinite"])
        theirs = other.summary(name, "sample")
        their_size = math.prod(other.summaries[name][0])
    else:
        array = other.read(name)
        finite = bool(np.isfinite(array).all())
        their_size = array.size
        theirs = array.reshape(-1)[where].astype(np.float64) if their_size == size else array
    if their_size != size:
        raise FormatError(
            f"{other.path}: tensor {name} has {their_size} numbers; {golden.path} says {shape}"
        )
    expected = Known(golden.summary(name, "sample"), golden.summary(name, NOISE))
    value = Value(name, None, name, tuple(shape[1:]))
    found = judged(value, theirs, expected, golden.positions[where // each])
    if finite:
        return found
    return replace(found, verdict="wrong", noise=math.inf, other=math.nan, ulp=math.inf)
