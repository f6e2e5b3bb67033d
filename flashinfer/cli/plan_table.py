"""``plan --table``: what is expected of a model with each budget, on each board."""

import contextlib
from argparse import Namespace

from flashinfer.cli.model_options import options_of
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import BudgetError, printable
from flashinfer.formats.progress import Progress
from flashinfer.plan.memory import format_size
from flashinfer.plan.profile import boards, measured
from flashinfer.plan.setup import Setup, prepare
from flashinfer.study.findings import Chart, Finding
from flashinfer.study.page import page

GIB = 1 << 30


def prepared(bundle: Bundle, args: Namespace) -> Setup:
    """The Setup of a bundle for the arguments of ``plan``, with its Flash closed."""
    setup = prepare(bundle, options_of(args, context=args.ctx_size))
    setup.flash.close()
    return setup


def table(bundle: Bundle, args: Namespace, progress: Progress) -> list[JsonObject]:
    """What is expected for each known device and each budget, a power of two, up to ``--memory`` or
    to twice the file; "tokens_per_second" is None where the budget is too small.

    progress  is told the plans made, as "plan"
    """
    most = args.memory or 2 * bundle.nbytes
    budgets = [1 << bits for bits in range(27, 50) if 1 << bits <= most]
    here = "here" if args.device is None and measured(bundle.path) else args.device
    devices = dict.fromkeys([*([here] if here else []), *boards()])
    cells, rows = [(device, budget) for device in devices for budget in budgets], []
    for device, budget in cells:
        args.device, args.memory = None if device == "here" else device, budget
        row: JsonObject = {"device": device, "memory": budget, "tokens_per_second": None}
        with contextlib.suppress(BudgetError):
            cost = prepared(bundle, args).expected
            assert cost is not None
            row |= {"tokens_per_second": cost.tokens_per_second, "bytes": cost.bytes}
        rows.append(row)
        progress("plan", len(rows), len(cells))
    return rows


def print_table(name: str, nbytes: int, rows: list[JsonObject]) -> None:
    """Print tokens/s, a line a device and a column a budget, without those too small for all."""
    speeds = {(row["device"], row["memory"]): row["tokens_per_second"] for row in rows}
    memories = [m for m in dict.fromkeys(row["memory"] for row in rows)
                if any(speeds[row["device"], m] for row in rows)]  # fmt: skip
    print(f"{printable(name)}: {format_size(nbytes)}; tokens/s by budget\n")
    print(f"{'':<16}" + "".join(f"{format_size(memory):>12}" for memory in memories))
    for device in dict.fromkeys(row["device"] for row in rows):
        found = [speeds[device, memory] for memory in memories]
        cells = "".join(f"{speed:>12.2f}" if speed else f"{'-':>12}" for speed in found)
        print(f"{printable(device):<16}{cells}")


def page_of(name: str, nbytes: int, rows: list[JsonObject]) -> str:
    """The same as a page with a chart."""
    series = {
        device: [(row["memory"] / GIB, row["tokens_per_second"]) for row in rows
                 if row["device"] == device and row["tokens_per_second"]]
        for device in dict.fromkeys(row["device"] for row in rows)
    }  # fmt: skip
    chart = Chart("Tokens per second by budget", "budget in GiB", "tokens/s", series,
                  log_x=True, log_y=True)  # fmt: skip
    found = Finding(
        "speed", "Speed by memory and board", "How fast will it write, and with how much memory?",
        "What the cost model expects; the profiles of boards say whether they were measured.",
        [f"As a bundle the model takes {format_size(nbytes)}. A line begins with the least budget "
         "that is enough there."], charts=[chart],
    )  # fmt: skip
    return page(f"A plan of {name}", "made by flashinfer plan --table", [found])
