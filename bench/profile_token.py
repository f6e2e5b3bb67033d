"""Where a token's time goes: each kernel, waiting for reads, and Python, which is the rest.

    python -m bench.profile_token MODEL [--memory SIZE] [--tokens N] [--json FILE]

Every kernel and every call into the reader is timed where the engine calls it.
"""

import argparse
import time
from collections import defaultdict

from bench.limits import machine
from flashinfer import Model, kernels
from flashinfer.cli.common import add_json, size, write_json

KERNELS = [name for name in kernels.NAMES if name != "Reader"]


class Timer:
    """Seconds and calls by name."""

    def __init__(self):
        self.seconds, self.calls = defaultdict(float), defaultdict(int)

    def wrap(self, name, function):
        def timed(*args, **options):
            begun = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - begun
                self.calls[name] += 1

        return timed


class TimedReader:
    """The model's reader, timed."""

    def __init__(self, reader, timer):
        self.reader, self.timer = reader, timer

    def submit(self, *args):
        ticket = self.timer.wrap("submit reads", self.reader.submit)(*args)
        return TimedTicket(ticket, self.timer)


class TimedTicket:
    def __init__(self, ticket, timer):
        self.wait = timer.wrap("wait for reads", ticket.wait)


def measure(path, memory, n_tokens):
    prompt = [5 + 7 * i for i in range(64)]
    with Model.open(path, memory=memory, context=64 + n_tokens) as model:
        list(model.generate(prompt, 8, temperature=0, stop_at_eos=False))
        timer = Timer()
        logits = model.forward([5])
        for name in KERNELS:
            setattr(kernels, name, timer.wrap(name, getattr(kernels, name)))
        model.flash.reader = TimedReader(model.flash.reader, timer)
        begun = time.perf_counter()
        for _ in range(n_tokens - 10):
            logits = model.forward([int(logits.argmax())])
        total = time.perf_counter() - begun
    tokens = n_tokens - 10
    rows = [
        {"part": name, "seconds": timer.seconds[name] / tokens, "calls": timer.calls[name] / tokens}
        for name in sorted(timer.seconds, key=timer.seconds.get, reverse=True)
    ]
    rest = total - sum(timer.seconds.values())
    rows.append({"part": "Python", "seconds": rest / tokens, "calls": None})
    return {"machine": machine(), "seconds": total / tokens, "rows": rows, "python": rest / total}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--memory", type=size)
    parser.add_argument("--tokens", type=int, default=64)
    add_json(parser)
    args = parser.parse_args()
    figures = measure(args.model, args.memory, max(20, args.tokens))
    print(f"{figures['machine']}: {1e3 * figures['seconds']:.1f} ms a token\n")
    print("| part | ms a token | share | calls a token |\n|---|---|---|---|")
    for row in figures["rows"]:
        calls = "" if row["calls"] is None else f"{row['calls']:.0f}"
        share = 100 * row["seconds"] / figures["seconds"]
        print(f"| {row['part']} | {1e3 * row['seconds']:.2f} | {share:.1f} % | {calls} |")
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
