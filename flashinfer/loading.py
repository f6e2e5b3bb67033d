"""Bringing into DRAM what the plan keeps there."""

from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.formats.arrays import UInt8Array
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.formats.progress import Progress
from flashinfer.paper.flash import Engine, Flash, aligned_bytes
from flashinfer.plan.plan import Plan
from flashinfer.plan.sizes import kv_bytes, pages
from flashinfer.transformer.kv_cache import ELEMENTS, KeyValueCache, kept_tokens, token_bytes
from flashinfer.transformer.kv_flash import KeyValueFile, KeyValuesOnFlash
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


def key_value_file(
    bundle: Bundle, plan: Plan, scratch: Path | None, flash: Flash
) -> KeyValueFile | None:
    """The file in the folder ``scratch`` that the plan wants for keys and values, or None.

    flash  of the model, whose way to read is taken
    """
    if scratch is None or not plan.kv_on_flash:
        return None
    io: Engine = "auto" if flash.io == "io_uring" else flash.io
    return KeyValueFile(scratch, plan.kv_flash_bytes(bundle), plan.kv_stage, io)


def allocate_texts(bundle: Bundle, plan: Plan, file: KeyValueFile | None) -> list[Text]:
    """The texts that there is room for, ``plan.texts`` of them, all empty; file: for the keys and
    values of ``plan.kv_on_flash``."""
    return [Text(_kv_caches(bundle, plan, file)) for _ in range(plan.texts)]


def _kv_caches(bundle: Bundle, plan: Plan, file: KeyValueFile | None) -> list[KeyValueCache]:
    """A text's KeyValueCache of each layer."""
    caches: list[KeyValueCache] = []
    layers = [layer.attention for layer in bundle.config.layers]
    sizes = [
        kv_bytes(config, plan, number in plan.kv_on_flash) for number, config in enumerate(layers)
    ]
    # An encoder's layers keep nothing for a next token, and use one memory in turn.
    shared = bundle.config.encoder
    block, at = aligned_bytes(max(sizes) if shared else sum(sizes)), 0
    for number, (config, size) in enumerate(zip(layers, sizes, strict=True)):
        memory = block[at : at + size]
        if file is not None and number in plan.kv_on_flash:
            caches.append(KeyValuesOnFlash(file, config, plan.kv_dtype, plan.context, memory))
        else:
            caches.append(_kv_cache(config, plan, memory))
        at += 0 if shared else size
    return caches


def _kv_cache(config: AttentionConfig, plan: Plan, memory: UInt8Array) -> KeyValueCache:
    """A layer's KeyValueCache in ``memory``."""
    tokens, heads = kept_tokens(config, plan.context), config.num_key_value_heads
    halves = memory.reshape(2, -1)[:, : tokens * token_bytes(config, plan.kv_dtype)]
    keys, values = (
        half.view(ELEMENTS[plan.kv_dtype]).reshape(heads, tokens, -1) for half in halves
    )
    return KeyValueCache(keys, values, config.attention_window, plan.context)
