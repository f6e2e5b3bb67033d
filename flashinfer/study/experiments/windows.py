"""What a sliding window keeps and saves, and that it changes no bit."""

import hashlib

import numpy as np

from flashinfer.paper.pieces import one_piece
from flashinfer.plan.expected_reads import expected_reads
from flashinfer.study.activity import Study, Used, activity
from flashinfer.study.findings import Chart, Finding, Table, percent

MOST = 20  # tokens of the largest window
SHOWN = (1, 2, 3, 4, 5, 8, 12, 16, 20)
BITS = (None, 1, 2, 5, 20)  # windows whose logits are compared
LONG = 512  # tokens over which they are


def run(study: Study) -> Finding:
    """The Finding of the study's first text."""
    layers = list(activity(study, study.samples[0], "windows"))
    needs = [aggregated(layer) for layer in layers]  # (MOST + 1,) each, units
    gap = study.profile.gap_bytes(layers[0].nbytes)
    rows = []
    for k in range(1, MOST + 1):
        held = sum(need[k] * layer.nbytes for need, layer in zip(needs, layers, strict=True))
        new = [need[k + 1] - need[k] for need in needs]
        nbytes, seconds = 0.0, 0.0
        for layer, missing in zip(layers, new, strict=True):
            read, requests = expected_reads(
                missing, layer.units, one_piece(layer.nbytes, 4096), gap
            )
            nbytes += read
            seconds += study.profile.batch_seconds(requests, read) if requests else 0.0
        units = sum(layer.units for layer in layers)
        rows.append([k, sum(need[k] for need in needs) / units, sum(new) / units,
                     held / 1e6, nbytes / 1e6, 1e3 * seconds])  # fmt: skip
    digests = {window: digest(study, window) for window in BITS}
    same = len(set(digests.values())) == 1
    five, one = rows[4], rows[0]  # what one token uses is what a window of 1 keeps
    answer = [
        f"A window of 5 tokens keeps {percent(five[1])} of the units in DRAM, {five[3]:.3g} MB, "
        f"and leaves {percent(five[2])} to be read for a token, which uses {percent(one[1])}: "
        f"{one[5]:.3g} ms of reads with a window of 1 become {five[5]:.3g} ms on "
        f"{study.profile.name}.",
        f"No window changes the output: the logits of {LONG} tokens have "
        + ("the same digest" if same else "DIFFERENT digests")
        + " with windows of "
        + ", ".join("no limit" if window is None else str(window) for window in BITS)
        + " tokens. A unit that is evicted is read again when it is used; a window decides when "
        "bytes are read, never whether.",
    ]
    shown = [row for row in rows if row[0] in SHOWN]
    return Finding(
        "windows",
        "Windows: what keeping the last tokens' neurons saves",
        "How many neurons do k tokens use together, how many does the next token need beyond them, "
        "and does the window change what the model says?",
        "Section 3.1, figure 4b, and the paper's second open question.",
        answer,
        [
            Table("By window", ["k", "share kept", "share read a token", "MB in DRAM",
                                "MB read a token", "ms of reads a token"], shown),
            Table("Digests of the logits", ["window", "SHA-256 of the logits"],
                  [["all" if window is None else window, told]
                   for window, told in digests.items()]),
        ],
        [
            Chart("Aggregated and new units", "window, tokens", "share of the units",
                  {"kept: used by the last k tokens": [(r[0], r[1]) for r in rows],
                   "read: needed beyond them": [(r[0], r[2]) for r in rows]}),
            Chart("What the window trades", "MB in DRAM", "ms of reads a token",
                  {"k = 1 to 20": [(r[3], r[5]) for r in rows]}),
        ],
    )  # fmt: skip


def aggregated(layer: Used) -> np.ndarray:
    """s(k): units that k tokens in a row use together, on average, for k = 0 to MOST + 1."""
    last = np.full(layer.units, -MOST - 2)
    sums, tokens = np.zeros(MOST + 2), 0
    for token, used in enumerate(layer.by_token(0, layer.tokens)):
        last[used] = token
        if token > MOST:
            ages = token - last
            sums[1:] += np.cumsum(np.bincount(ages[ages <= MOST], minlength=MOST + 1))
            tokens += 1
    return sums / max(1, tokens)


def digest(study: Study, window: int | None) -> str:
    """Of the logits of the first text's tokens, with a window of so many tokens."""
    ids = study.samples[0].ids
    with study.open(window=window, draft="off") as model:
        told = hashlib.sha256()
        for token in ids[: min(LONG, model.plan.context)]:
            told.update(model.forward([token]).tobytes())
    return told.hexdigest()[:16]
