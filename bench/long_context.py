"""A context whose keys and values take much of the budget: in DRAM, and where the plan puts them.

    python -m bench.long_context [--model x.flash] [--like opt-1.3b] [--context N] [--json FILE]

Makes a synthetic bundle of the shape, and generates behind a prompt of half the context, in memory
cgroups (as root) of several sizes: with all keys and values in DRAM where that is possible, and
with as many of them on flash as the plan finds best. The text must be the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from bench.cgroup import NoCgroups, run_limited
from bench.limits import machine
from bench.models import synthetic_model
from flashinfer import BudgetError, Model
from flashinfer.cli.common import add_json, positive, size, write_json
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.plan import setup
from flashinfer.synth.shapes import NAMES

SIZES = ("450M", "600M", "1000M", "1500M")
TOKENS = 32


def run(model, memory, context, in_dram):
    """Figures of a prompt and the tokens after it, printed as JSON: in a process of its own."""
    if in_dram:
        setup.KV_SHARES = (0.0,)
    with Bundle(model) as bundle:
        vocabulary = bundle.config.vocab_size
    prompt = [3 + 37 * i % (vocabulary - 3) for i in range(context // 2 - TOKENS // 2)]
    try:
        with Model.open(model, memory=memory, context=context, draft="off") as opened:
            list(opened.generate(prompt, TOKENS, temperature=0, stop_at_eos=False))
            figures = opened.stats.as_dict()
            figures["layers_on_flash"] = len(opened.plan.kv_on_flash)
            figures["kv_cache_bytes"] = opened.plan.kv_cache
            figures["kv_flash_bytes"] = opened.plan.kv_flash_bytes(opened.bundle)
    except BudgetError as error:
        figures = {"least_budget": error.least}
    print(json.dumps(figures))


def measured(model, memory, context, in_dram, repeats):
    """The medians of some runs in a cgroup; or {"least_budget": ...}."""
    arguments = [str(model), memory, context, in_dram]
    code = f"from bench.long_context import run; run(*{arguments!r})"
    runs = []
    for _ in range(repeats):
        done = run_limited([sys.executable, "-c", code], memory, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{memory} bytes: exit code {done.returncode}")
        runs.append(json.loads(done.stdout))
        if "least_budget" in runs[0]:
            return runs[0]
    assert all(one["token_ids"] == runs[0]["token_ids"] for one in runs)
    middle = {
        key: statistics.median(one[key] for one in runs)
        for key in ("tokens_per_second", "prompt_tokens_per_second", "peak_rss_bytes")
    }
    return {**runs[0], **middle}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("long-context.flash"))
    parser.add_argument("--like", choices=NAMES, default="opt-1.3b")
    parser.add_argument("--context", type=positive, default=2048, metavar="TOKENS")
    parser.add_argument("--memory", type=size, nargs="+", default=[size(text) for text in SIZES])
    parser.add_argument("--repeats", type=positive, default=3)
    add_json(parser)
    args = parser.parse_args()
    rows = []
    with synthetic_model(args.model, args.like) as model:
        try:
            for memory in args.memory:
                for in_dram in (True, False):
                    figures = measured(model.resolve(), memory, args.context, in_dram, args.repeats)
                    rows.append({"memory": memory, "in_dram": in_dram, **figures})
        except NoCgroups as why:
            raise SystemExit(f"skipped: {why}") from None
        nbytes = model.stat().st_size
    texts = [row["token_ids"] for row in rows if "token_ids" in row]
    assert all(text == texts[0] for text in texts)
    print(
        f"{machine()}; medians of {args.repeats}\nmodel {nbytes / 1e6:,.0f} MB, a context of "
        f"{args.context} tokens, half of it filled\n\n"
        "| memory | keys and values | in DRAM | layers on flash | prompt tokens/s | tokens/s "
        "| MB a token | expected | peak RSS |\n|---|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        where = "in DRAM" if row["in_dram"] else "as planned"
        begin = f"| {row['memory'] / 1e6:,.0f} MB | {where} "
        if "least_budget" in row:
            print(f"{begin}| needs {row['least_budget'] / 1e6:,.0f} MB | | | | | | |")
            continue
        print(
            f"{begin}| {row['kv_cache_bytes'] / 1e6:,.0f} MB | {row['layers_on_flash']} "
            f"| {row['prompt_tokens_per_second']:.0f} | {row['tokens_per_second']:.2f} "
            f"| {row['flash_bytes_per_token'] / 1e6:,.0f} "
            f"| {(row['expected_flash_bytes_per_token'] or 0) / 1e6:,.0f} "
            f"| {row['peak_rss_bytes'] / 1e6:,.0f} MB |"
        )
    write_json(args.json, {"machine": machine(), "context": args.context, "rows": rows})


if __name__ == "__main__":
    main()
