"""Cache policies on one trace: the paper's window, least recently used, frecency, and the optimum.

    python -m bench.cache_policies [MODEL] [--text FILE] [--tokens N] [--json FILE]

The trace is what the model's predictors ask for, token by token, along a text. The optimum drops
the neuron whose next use lies furthest ahead (Belady, 1966): no cache can miss less, and none can
know it beforehand. Misses are counted in the second half; the first warms the cache.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.limits import machine
from flashinfer import Model
from flashinfer.cli.common import add_json, write_json
from flashinfer.cli.run import demo_model
from flashinfer.paper.neuron_cache import NeuronCache
from flashinfer.paper.prefetch import NoPrefetch
from flashinfer.text.tokenizer import Tokenizer

SHARES = (0.125, 0.25, 0.5, 0.75)  # of a layer's rows
POLICIES = ("window", "lru", "frecency", "optimal")
NEVER = 1 << 40


class Recorder:
    """A predictor, or router, that notes what it chose."""

    def __init__(self, predictor):
        self.predictor, self.chosen = predictor, []

    def select(self, x, residual):
        self.chosen.append(self.predictor.select(x, residual))
        return self.chosen[-1]


def record(path, text, n_tokens):
    """Run the model along the text; return [layer][token] Selection, and d_ffn."""
    with Model.open(path) as model:
        ids = token_ids(model, text, n_tokens)
        recorders = [Recorder(layer.feed_forward.predictor) for layer in model.layers]
        for layer, recorder in zip(model.layers, recorders, strict=True):
            layer.feed_forward.predictor = recorder
            layer.feed_forward.prefetch = NoPrefetch()
        for token in tqdm(ids, desc="trace", leave=False, delay=1):
            if model.position == model.plan.context:
                model.reset()
            model.forward([token])
        return [recorder.chosen for recorder in recorders], model.config.layers[0].ffn.units


def token_ids(model, text, n_tokens):
    """Of the text, or where there is none, such as a synthetic model takes."""
    if text is None:
        return [5 + 7 * i % (model.config.vocab_size - 5) for i in range(n_tokens)]
    return Tokenizer(model.bundle).encode(Path(text).read_text(encoding="utf-8"))[:n_tokens]


def misses(trace, neurons, rows, policy):
    """Neurons that a cache of this many rows reads per token, over the trace's second half."""
    if policy == "optimal":
        return optimal_misses(trace, neurons, rows)
    window = fitting_window(trace, neurons, rows) if policy == "window" else None
    cache = NeuronCache(neurons, np.zeros(rows, dtype=np.uint8), 1, policy, window)
    for token, selection in enumerate(trace):
        if token == len(trace) // 2:
            cache.misses = 0
        cache.priority.note(selection, token)
        cache.place(selection.units, token)
    return cache.misses / (len(trace) - len(trace) // 2)


def fitting_window(trace, neurons, rows):
    """The longest window of which no stretch of the trace needs more rows."""
    ages = np.full(neurons, NEVER)
    longest = NEVER
    for selection in trace:
        ages += 1
        ages[selection.units] = 0
        longest = min(longest, int(np.partition(ages, rows)[rows]) if rows < neurons else NEVER)
    return max(1, longest)


def optimal_misses(trace, neurons, rows, warm=None):
    """Of a cache that knows what comes, counted from token ``warm`` on, else in the second half."""
    warm = len(trace) // 2 if warm is None else warm
    following, coming = np.full(neurons, NEVER), []
    for token in range(len(trace) - 1, -1, -1):
        coming.append(following[trace[token].units])
        following[trace[token].units] = token
    held, next_use, count = np.zeros(neurons, dtype=bool), np.full(neurons, NEVER), 0
    for token, selection in enumerate(trace):
        used = selection.units
        count += np.count_nonzero(~held[used]) if token >= warm else 0
        held[used], next_use[used] = True, coming.pop()
        excess = np.count_nonzero(held) - rows
        if excess > 0:
            there = np.flatnonzero(held)
            held[there[np.argpartition(-next_use[there], excess - 1)[:excess]]] = False
    return count / (len(trace) - warm)


def measure(traces, neurons):
    """Rows of the table: shares of the neurons used that had to be read, over all layers."""
    table = []
    for share in tqdm(SHARES, desc="caches", leave=False):
        rows = int(share * neurons)
        fitting = [t for t in traces if max(len(s.units) for s in t) <= rows]
        used = sum(np.mean([len(s.units) for s in trace[len(trace) // 2 :]]) for trace in fitting)
        row = {"rows": rows, "share": share, "layers": len(fitting)}
        for policy in POLICIES:
            read = sum(misses(trace, neurons, rows, policy) for trace in fitting)
            row[policy] = read / used if used else None
        table.append(row)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: the demo model")
    parser.add_argument("--text", metavar="FILE", help="default: token ids counted up")
    parser.add_argument("--tokens", type=int, default=1500)
    add_json(parser)
    args = parser.parse_args()
    traces, neurons = record(args.model or demo_model(), args.text, args.tokens)
    rows = measure(traces, neurons)
    print("| rows in DRAM | layers | " + " | ".join(POLICIES) + " |")
    print("|---|---|" + "---|" * len(POLICIES))
    for row in rows:
        cells = (f"{100 * row[p]:.1f} %" if row["layers"] else "" for p in POLICIES)
        print(f"| {100 * row['share']:g} % | {row['layers']} | " + " | ".join(cells) + " |")
    print("\nShare of the neurons used that had to be read; layers whose every token fits.")
    write_json(args.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
