"""Bringing into DRAM what the plan keeps there."""

import numpy as np

from flashinfer.attention import padded_width
from flashinfer.flash import aligned_bytes
from flashinfer.memory import kv_dtype, pages
from flashinfer.weights import Resident, Streamed

LOAD_BYTES = 64 << 20  # read at a time


def load_weights(bundle, plan, flash, buffer, progress):
    """{name: Resident, Streamed, or for vectors a float32 array} for all of a bundle but its FFN.

    What stays lies in one block of memory as it lies in the file, where it comes first: so it is
    read in one go. ``progress`` is called as progress("load", bytes, bytes in all).
    """
    kept, streamed = [], []
    for spec in bundle.specs:
        (kept if plan.stays(spec) else streamed).append(spec)
    block = aligned_bytes(sum(pages(bundle.tensors[spec.name].nbytes) for spec in kept))
    weights, at, run = {}, 0, None
    runs = []  # [offset, length, destination]: neighbours on flash are read as one
    for spec in kept:
        tensor = bundle.tensors[spec.name]
        length = pages(tensor.nbytes)
        if run and run[0] + run[1] == tensor.offset:
            run[1] += length
        else:
            run = [tensor.offset, length, at]
            runs.append(run)
        data = block[at : at + tensor.nbytes].reshape(tensor.rows, tensor.row_bytes)
        if len(spec.shape) == 1:
            weights[spec.name] = data.reshape(-1).view(np.float32)
        else:
            weights[spec.name] = Resident(tensor, data)
        at += length
    done = 0
    for offset, length, destination in runs:
        for start in range(0, length, LOAD_BYTES):
            size = min(LOAD_BYTES, length - start)
            flash.wait(flash.submit_range(offset + start, size, block, destination + start))
            done += size
            progress("load", done, len(block))
    for spec in streamed:
        weights[spec.name] = Streamed(bundle.tensors[spec.name], flash, buffer)
    return weights


def allocate_kv_cache(bundle, plan):
    """Keys and values of each layer: two lists of (heads, context, padded head_dim) arrays."""
    config, item = bundle.config, kv_dtype(bundle)
    shape = (config.num_key_value_heads, plan.context, padded_width(config.head_dim))
    nbytes = int(np.prod(shape)) * item.itemsize
    block = aligned_bytes(2 * config.num_hidden_layers * pages(nbytes))
    views = [
        block[start : start + nbytes].view(item).reshape(shape)
        for start in range(0, len(block), pages(nbytes))
    ]
    return views[0::2], views[1::2]
