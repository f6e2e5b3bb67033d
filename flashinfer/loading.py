"""Bringing into DRAM what the plan keeps there."""

from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.formats.arrays import Float32Array, UInt8Array
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.progress import Progress
from flashinfer.paper.flash import Flash, aligned_bytes
from flashinfer.paper.open_file import Engine
from flashinfer.plan.plan import Plan
from flashinfer.plan.sizes import memory_bytes
from flashinfer.transformer.kv_flash import KeyValueFile, KeyValuesOnFlash
from flashinfer.transformer.mixer import MemoryWanted
from flashinfer.transformer.mixers import kind_of
from flashinfer.transformer.text import Text
from flashinfer.transformer.text_memory import BorrowedMemory, TextMemory
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
    spans = {name: bundle.tensors[name].pages_of(rows) for name, rows in kept.items()}
    block = aligned_bytes(sum(span.nbytes for span in spans.values()))
    weights: dict[str, Any] = {}
    at = 0
    runs: list[list[int]] = []  # [offset, length, destination]: neighbours on flash are read as one
    for spec in sorted(bundle.specs, key=lambda spec: bundle.tensors[spec.name].offset):
        tensor, rows = bundle.tensors[spec.name], kept.get(spec.name, 0)
        if not rows:
            weights[spec.name] = Streamed(tensor, flash, buffer)
            continue
        offset, length = spans[spec.name]
        if runs and sum(runs[-1][:2]) == offset:
            runs[-1][1] += length
        else:
            runs.append([offset, length, at])
        begin = at + tensor.offset - offset
        data = block[begin : begin + rows * tensor.row_bytes].reshape(rows, tensor.row_bytes)
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
    mixers = [layer.mixer for layer in bundle.config.layers]
    most = max(kind_of(one).state_numbers(one) for one in mixers) if plan.drafts else 0
    scratch = aligned_bytes(4 * most).view(np.float32)
    return [Text(_text_memories(bundle, plan, file, scratch)) for _ in range(plan.texts)]


def _text_memories(
    bundle: Bundle, plan: Plan, file: KeyValueFile | None, scratch: Float32Array
) -> list[TextMemory]:
    """A text's TextMemory of each layer."""
    memories: list[TextMemory] = []
    mixers = [layer.mixer for layer in bundle.config.layers]
    sizes = [
        memory_bytes(config, plan, number in plan.kv_on_flash, plan.drafts)
        for number, config in enumerate(mixers)
    ]
    # An encoder's layers keep nothing for a next token, and use one memory in turn.
    shared = bundle.config.encoder
    block, at = aligned_bytes(max(sizes) if shared else sum(sizes)), 0
    for number, (config, size) in enumerate(zip(mixers, sizes, strict=True)):
        memory = block[at : at + size]
        if config.memory_of is not None:
            memories.append(BorrowedMemory(memories[config.memory_of]))
        elif file is not None and number in plan.kv_on_flash:
            attention = bundle.config.layers[number].attention
            memories.append(KeyValuesOnFlash(file, attention, plan.kv_dtype, plan.context, memory))
        else:
            kind, wanted = kind_of(config), MemoryWanted(plan.context, plan.kv_dtype, plan.drafts)
            memory = memory[: kind.memory_bytes(config, wanted)]
            memories.append(kind.new_memory(config, wanted, memory, scratch))
        at += 0 if shared else size
    return memories
