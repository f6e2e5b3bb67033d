"""Bringing into DRAM what the plan keeps there."""

from typing import Any

import numpy as np

from flashinfer.formats.arrays import UInt8Array
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.progress import Progress
from flashinfer.paper.flash import Flash, aligned_bytes
from flashinfer.plan.plan import Plan
from flashinfer.plan.sizes import pages
from flashinfer.transformer.kv_cache import ELEMENTS, KeyValueCache, kept_tokens, token_bytes
from flashinfer.transformer.text import Text
from flashinfer.transformer.weights import PartlyStreamed, Resident, Streamed

LOAD_BYTES = 64 << 20  # read at a time


def load_weights(
    bundle: Bundle, plan: Plan, flash: Flash, buffer: UInt8Array, progress: Progress
) -> dict[str, Any]:
    """{name: what weights.py has, or for vectors a float32 array} for all of a bundle but its FFN.

    What stays lies in one block of memory as it lies in the file, where it comes first: so it is
    read in one go. ``progress`` is called as progress("load", bytes, bytes in all).
    """
    kept = {
        spec.name: rows
        for spec in bundle.specs
        if (rows := plan.rows_kept(spec, bundle.tensors[spec.name]))
    }
    sizes = {name: rows * bundle.tensors[name].row_bytes for name, rows in kept.items()}
    block = aligned_bytes(sum(pages(size) for size in sizes.values()))
    weights: dict[str, Any] = {}
    at = 0
    runs: list[list[int]] = []  # [offset, length, destination]: neighbours on flash are read as one
    for spec in sorted(bundle.specs, key=lambda spec: bundle.tensors[spec.name].offset):
        tensor, rows = bundle.tensors[spec.name], kept.get(spec.name, 0)
        if not rows:
            weights[spec.name] = Streamed(tensor, flash, buffer)
            continue
        length = pages(sizes[spec.name])
        if runs and sum(runs[-1][:2]) == tensor.offset:
            runs[-1][1] += length
        else:
            runs.append([tensor.offset, length, at])
        data = block[at : at + sizes[spec.name]].reshape(rows, tensor.row_bytes)
        if len(spec.shape) == 1:
            weights[spec.name] = data.reshape(-1).view(np.float32)
        elif rows == tensor.rows:
            weights[spec.name] = Resident(tensor, data)
        else:
            weights[spec.name] = PartlyStreamed(tensor, data, flash, buffer)
        at += length
    done = 0
    for offset, length, destination in runs:
        for start in range(0, length, LOAD_BYTES):
            size = min(LOAD_BYTES, length - start)
            flash.wait(flash.submit_range(offset + start, size, block, destination + start))
            done += size
            progress("load", done, len(block))
    return weights


def allocate_texts(bundle: Bundle, plan: Plan) -> list[Text]:
    """The texts that there is room for, ``plan.texts`` of them, all empty."""
    return [Text(_kv_caches(bundle, plan)) for _ in range(plan.texts)]


def _kv_caches(bundle: Bundle, plan: Plan) -> list[KeyValueCache]:
    """A text's KeyValueCache of each layer."""
    at, caches = 0, []
    layers = [layer.attention for layer in bundle.config.layers]
    tokens = [kept_tokens(config, plan.context) for config in layers]
    sizes = [
        n * token_bytes(config, plan.kv_dtype) for config, n in zip(layers, tokens, strict=True)
    ]
    block = aligned_bytes(2 * sum(pages(size) for size in sizes))
    for config, n, size in zip(layers, tokens, sizes, strict=True):
        halves = block[at : at + 2 * pages(size)].reshape(2, -1)[:, :size]
        shape = config.num_key_value_heads, n, -1
        keys, values = (half.view(ELEMENTS[plan.kv_dtype]).reshape(shape) for half in halves)
        caches.append(KeyValueCache(keys, values, config.attention_window, plan.context))
        at += 2 * pages(size)
    return caches
