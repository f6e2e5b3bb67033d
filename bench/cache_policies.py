"""Cache policies on one trace: the paper's window, least recently used, frecency, and the optimum.

    python -m bench.cache_policies [MODEL] [--text FILE] [--tokens N] [--json FILE]

The trace is what the model's predictors ask for, token by token, along a text. The optimum drops
the neuron whose next use lies furthest ahead (Belady, 1966): no cache can miss less, and none can
know it beforehand. Misses are counted in the second half; the first warms the cache.

Of a mixture of experts caches that hold less than one token's experts are simulated, too, and three
tables more ask what misses least there: which experts are admitted, what a use is worth by its age
and to the last token, and how slots are shared among the layers. Such a model needs no text where
it is synthetic: ``flashinfer synth x.flash --like olmoe-1b-7b``.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.limits import machine
from flashinfer import Model
from flashinfer.calibration.traces import miss_curve
from flashinfer.cli.common import add_json, write_json
from flashinfer.cli.run import demo_model
from flashinfer.paper.neuron_cache import NeuronCache
from flashinfer.paper.prefetch import NoPrefetch
from flashinfer.paper.waves import in_waves
from flashinfer.plan.slot_shares import CachedLayer, Curve, fewest_misses
from flashinfer.study.optimal import NEVER, optimal_misses
from flashinfer.text.tokenizer import Tokenizer

SHARES = (0.125, 0.25, 0.5, 0.75)  # of a layer's rows
FEW = (1 / 64, 1 / 32, 1 / 16, 3 / 32)  # of a mixture's
POLICIES = ("window", "lru", "frecency", "optimal")
TRANSIT = 4  # slots, as for experts of 3.5 MB
HALF_LIVES, LAST_USES = (4.0, 16.0, 64.0), (0.0, 4.0, 8.0, 16.0)


class Recorder:
    """A predictor, or router, that notes what it chose."""

    def __init__(self, predictor):
        self.predictor, self.chosen = predictor, []

    def select(self, x, residual):
        self.chosen.append(self.predictor.select(x, residual))
        return self.chosen[-1]


def record(path, text, n_tokens):
    """Run the model along the text; return [layer][token] Selection, the units of a layer, and
    whether they are experts."""
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
        ffn = model.config.layers[0].ffn
        return [recorder.chosen for recorder in recorders], ffn.units, ffn.reads_experts


def token_ids(model, text, n_tokens):
    """Of the text, or where there is none, such as a synthetic model takes."""
    if text is None:
        return [5 + 7 * i % (model.config.vocab_size - 5) for i in range(n_tokens)]
    return Tokenizer(model.bundle).encode(Path(text).read_text(encoding="utf-8"))[:n_tokens]


def misses(trace, neurons, rows, policy, transit=TRANSIT, **worth):
    """Neurons that a cache of this many rows reads per token, over the trace's second half.

    transit  slots for what passes through; 0: all is admitted
    worth    attributes of the cache's Priority, such as its half_life
    """
    if policy == "optimal":
        return optimal_misses(trace, neurons, rows)
    window = fitting_window(trace, neurons, rows) if policy == "window" else None
    memory, own = np.zeros(rows + transit, dtype=np.uint8), slice(rows)
    cache = NeuronCache(neurons, memory, 1, policy, window, own, slice(rows, rows + transit))
    vars(cache.priority).update(worth)
    for token, selection in enumerate(trace):
        if token == len(trace) // 2:
            cache.misses = 0
        cache.priority.note(selection, token)
        if len(selection.units) <= rows:
            cache.place(selection.units, token)
        else:
            list(in_waves(cache, selection.units, token, 2, lambda units, slots: None))
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


def measure(traces, neurons, experts):
    """Rows of the table: shares of the neurons used that had to be read, over all layers."""
    table = []
    for share in tqdm((*FEW, *SHARES) if experts else SHARES, desc="caches", leave=False):
        rows = int(share * neurons)
        fitting = [t for t in traces if experts or max(len(s.units) for s in t) <= rows]
        used = sum(np.mean([len(s.units) for s in trace[len(trace) // 2 :]]) for trace in fitting)
        row = {"rows": rows, "share": share, "layers": len(fitting)}
        for policy in POLICIES:
            read = sum(misses(trace, neurons, rows, policy) for trace in fitting)
            row[policy] = read / used if used else None
        table.append(row)
    return table


def share_missed(traces, neurons, slots, **options):
    """Of the units used, those read, with so many slots in each layer; options as ``misses``."""
    read = sum(
        misses(t, neurons, n, "frecency", **options) for t, n in zip(traces, slots, strict=True)
    )
    return read / sum(np.mean([len(s.units) for s in t[len(t) // 2 :]]) for t in traces)


def in_few_layers(n, layers, most):
    """Of n slots as many as ``most`` for each of the first layers, as far as they go."""
    return [min(most, max(0, n - most * i)) for i in range(layers)]


def small_caches(traces, units):
    """Tables of a mixture's caches of less than a token's experts: [(title, [row])]."""
    layers, used = len(traces), len(traces[0][-1].units)
    sizes = [n for n in (1, 2, 4, used - 2, used - 1) if 0 < n < used]
    admission = {"all are admitted": {"transit": 0}, "those worth more": {}}
    weighing = {
        f"half life {h:g}, the last use {u:g} times": {"half_life": h, "last_use": u}
        for h in HALF_LIVES
        for u in LAST_USES
    }
    first = [t[: len(t) // 2] for t in traces]
    curves = [miss_curve(t, units, passing=True) for t in first]
    cached = [CachedLayer(units, 1, (used,), 0, Curve(curve)) for curve in curves]
    splits = {
        "evenly": lambda n: [n] * layers,
        "in few layers": lambda n: in_few_layers(n * layers, layers, used),
        "by their curves": lambda n: fewest_misses(cached, n * layers, passing=True),
    }
    tables = []
    for title, cases in (("Admitted", admission), ("Worth", weighing), ("Shared", splits)):
        rows = []
        for name, case in tqdm(cases.items(), desc=title, leave=False):
            row = {"case": name}
            for n in sizes:
                slots, options = ([n] * layers, case) if isinstance(case, dict) else (case(n), {})
                row[str(n)] = share_missed(traces, units, slots, **options)
            rows.append(row)
        tables.append({"title": title, "rows": rows})
    return tables


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: the demo model")
    parser.add_argument("--text", metavar="FILE", help="default: token ids counted up")
    parser.add_argument("--tokens", type=int, default=1500)
    add_json(parser)
    args = parser.parse_args()
    traces, neurons, experts = record(args.model or demo_model(), args.text, args.tokens)
    rows = measure(traces, neurons, experts)
    few = small_caches(traces, neurons) if experts else []
    print("| rows in DRAM | layers | " + " | ".join(POLICIES) + " |")
    print("|---|---|" + "---|" * len(POLICIES))
    for row in rows:
        cells = (f"{100 * row[p]:.1f} %" if row["layers"] else "" for p in POLICIES)
        print(f"| {100 * row['share']:g} % | {row['layers']} | " + " | ".join(cells) + " |")
    which = "" if experts else "; layers whose every token fits"
    print(f"\nShare of the neurons used that had to be read{which}.")
    for table in few:
        print_cases(table["title"], table["rows"])
    write_json(args.json, {"machine": machine(), "rows": rows, "small_caches": few})


def print_cases(title, rows):
    sizes = list(rows[0])[1:]
    print(f"\n| {title}, slots a layer | " + " | ".join(sizes) + " |\n|---|" + "---|" * len(sizes))
    for row in rows:
        cells = (f"{100 * row[n]:.1f} %" for n in sizes)
        print(f"| {row['case']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
