"""What drafts bring: passes that check several tokens, by how often drafts are right.

    python -m bench.speculation [--dir DIR] [--only streamed,demo,mixtures] [--quick] [--json FILE]

As root, with cgroups. Three parts:

streamed  a dense Llama of 1.1 B parameters and OPT-1.3B's shape (with all neurons, and with those
          predicted) in a memory cgroup of half the file;
mixtures  OLMoE's and Qwen3-30B-A3B's shape in a quarter.
          In both the drafts come from a known continuation, the one that the model writes without
          drafts, and each drafted token is right with a given probability: 0 to 0.95.
demo      the demo model on Python source and on plain English that it was not trained on, with
          n-gram drafts, and with those of a store that it wrote itself about other source files; in
          DRAM, and with its disk held to an SD card's speed and a budget near the least.

Each process writes the same text with and without drafts, in turn, and compares the tokens.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from bench.cgroup import Disk, NoCgroups, run_limited
from bench.limits import machine
from bench.models import synthetic_model
from flashinfer import BudgetError, Model
from flashinfer.cli.common import add_json, write_json
from flashinfer.cli.run import demo_model
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.generation.drafts import Draft
from flashinfer.generation.pace import Pace
from flashinfer.generation.store import write_store
from flashinfer.generation.suffixes import agreement
from flashinfer.plan.profile import load, save
from flashinfer.probe.probing import probe
from flashinfer.text.tokenizer import Tokenizer

TOKENS_OF_DEMO, QUICK_TEXTS = 120, 3
NEAR = 6 << 20  # bytes above the least budget, for the store's pages
SHARES = (0.0, 0.3, 0.6, 0.8, 0.95)
STREAMED = (
    ("tinyllama-1.1b", "dense", 0.5),
    ("opt-1.3b", "dense", 0.5),
    ("opt-1.3b", "predicted", 0.5),
)
MIXTURES = (("olmoe-1b-7b", None, 0.25), ("qwen3-30b-a3b", None, 0.25))
DTYPES = {"qwen3-30b-a3b": "q4_0"}
PROMPT = [5, 7, 9, 11]
SD_CARD = Disk("SD card, 80 MB/s", 80_000_000, 2500)
EXAMPLES = Path(__file__).parents[1]


class Known:
    """Drafts a known text, each token right with the probability ``share``."""

    name = "known"

    def __init__(self, text, share, vocab_size):
        import random

        self.text, self.share, self.vocab_size = text, share, vocab_size
        self.random = random.Random(1)

    def seconds(self, tokens):
        return 0.0

    def draft(self, ids, most, sampler):
        return Draft(most, self.name, 0.6, lambda n: self.tokens(len(ids), n))

    def tokens(self, at, n):
        right = [*self.text[at : at + n], *[0] * n][:n]
        return [
            t if self.random.random() < self.share else (t + 1) % self.vocab_size for t in right
        ]


class Never:
    """Drafts nothing."""

    name = "none"

    def seconds(self, tokens):
        return 0.0

    def draft(self, ids, most, sampler):
        return None


def figures_of(model, pace):
    phase, drafts = model.stats.generation, model.stats.drafts
    used = max(1, drafts.passes)
    size = round((drafts.drafted + used) / used)
    return {
        "tokens_per_second": phase.tokens_per_second,
        "flash_bytes_per_token": phase.bytes_per_token,
        "passes": drafts.passes,
        "drafted": drafts.drafted,
        "accepted": drafts.accepted,
        "expected_pass_seconds": pace.times.expected(size) if pace.times.expected else None,
        "pass_seconds": phase.seconds / used,
    }


def one_known(path, memory, device, mode, tokens, rounds, shares):
    """In a process of its own: {share: figures}, None: without drafts; each round in turn."""
    options = {} if mode is None else {"neurons": mode}
    found = {}
    with Model.open(path, memory=memory, context=256, device=load(device), **options) as model:
        expected = model.pace.times.expected

        def run(drafter):
            model.pace = Pace(expected, model.plan.drafts)
            ids = list(model.generate(PROMPT, tokens, 0, stop_at_eos=False, drafter=drafter))
            return ids, figures_of(model, model.pace)

        text, _ = run(Never())  # and the caches are warm
        for _ in range(rounds):
            for share in (None, *shares):
                drafter = Never()
                if share is not None:
                    drafter = Known(PROMPT + text, share, model.config.vocab_size)
                ids, figures = run(drafter)
                assert ids == text
                found.setdefault(str(share), []).append(figures)
    print(json.dumps({"drafts": model.plan.drafts, "runs": found}))


def one_demo(path, memory, device, texts, draft, tokens):
    """In a process of its own: figures of each text's continuation with one kind of drafts."""
    texts, found = json.loads(Path(texts).read_text()), {}
    with Model.open(path, memory=memory, context=512, device=load(device), draft=draft) as model:
        for kind, prompts in texts.items():
            for prompt in prompts:
                ids = list(model.generate(prompt, tokens, 0, stop_at_eos=False))
                figures = figures_of(model, model.pace)
                figures["token_ids"] = ids
                found.setdefault(f"{kind}/{Path(draft).name}", []).append(figures)
    print(json.dumps(found))


def least_memory(context):
    """Print the least budget for the demo model: of a process that holds nothing else."""
    try:
        Model.open(demo_model(), memory=1, context=context)
    except BudgetError as error:
        print(error.least)


def limited(function, memory, disk, path, *arguments):
    """What one of the functions above prints, run in a cgroup of ``memory`` bytes."""
    code = f"from bench.speculation import {function.__name__} as f; f(*{arguments!r})"
    run = run_limited(
        [sys.executable, "-c", code], memory, disk, path, capture_output=True, text=True
    )
    if run.returncode:
        raise SystemExit(f"{path}: exit code {run.returncode}: {run.stderr[-800:]}")
    return json.loads(run.stdout)


def known(args, cases, device):
    """Rows of the parts whose drafts come from a known continuation."""
    rows = []
    for like, mode, share in cases:
        dtype = DTYPES.get(like, "f16")
        path = args.dir / f"bench-{like}-{dtype}.flash"
        with synthetic_model(path, like, dtype, keep=args.keep):
            memory = int(path.stat().st_size * share) // 4096 * 4096
            tokens, rounds = (24, 1) if args.quick else (64, 3)
            found = limited(
                one_known, memory, None, path, str(path), memory, str(device), mode, tokens, rounds,
                SHARES,
            )  # fmt: skip
        rows += rows_of(like, mode, share, found)
        print_rows(rows[-len(SHARES) - 1 :])
    return rows


def rows_of(like, mode, memory_share, found):
    rows = []
    for share, runs in found["runs"].items():
        base = found["runs"]["None"]
        ratios = [
            run["tokens_per_second"] / without["tokens_per_second"]
            for run, without in zip(runs, base, strict=True)
        ]
        middle = {key: statistics.median(run[key] or 0 for run in runs) for key in runs[0]}
        rows.append(
            {"model": like, "neurons": mode or "routed", "memory_share": memory_share,
             "right": None if share == "None" else float(share),
             "times_without": statistics.median(ratios), **middle}
        )  # fmt: skip
    return rows


def print_rows(rows):
    for row in rows:
        right = "none" if row["right"] is None else f"{row['right']:.2f}"
        print(
            f"| {row['model']}, {row['neurons']} | {right} | {row['tokens_per_second']:.2f} | "
            f"{row['times_without']:.2f} | {row['flash_bytes_per_token'] / 1e6:.0f} MB | "
            f"{row['drafted']:.0f} | {row['accepted']:.0f} | {row['passes']:.0f} | "
            f"{1e3 * row['pass_seconds']:.0f} ms | {1e3 * row['expected_pass_seconds']:.0f} ms |",
            flush=True,
        )


def demo(args, device):
    """Rows of the demo model: on source text, and on English."""
    kinds = demo_texts()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        store = Path(folder) / "source.store"
        with Model.open(demo_model(), context=512, texts=16) as model:
            written = [
                [*w.request.prompt, *w.token_ids]
                for w in model.generate_many(kinds.pop("for the store"), 200, 0, stop_at_eos=False)
            ]
            vocabulary, vocab_size = model.bundle.vocabulary, model.config.vocab_size
        write_store(store, written, vocabulary)
        named, _ = agreement(written, vocab_size, 10)
        if args.quick:
            kinds = {kind: prompts[:QUICK_TEXTS] for kind, prompts in kinds.items()}
        texts = Path(folder) / "texts.json"
        texts.write_text(json.dumps(kinds))
        least = limited(least_memory, 1 << 30, None, demo_model(), 512) + NEAR
        rows = []
        for name, memory, disk in (("in DRAM", 1 << 30, None), (SD_CARD.name, least, SD_CARD)):
            found = {}
            for draft in ("off", "ngram", str(store)):
                found |= limited(
                    one_demo, memory, disk, demo_model(), str(demo_model()), memory, str(device),
                    str(texts), draft, TOKENS_OF_DEMO,
                )  # fmt: skip
            for kind in kinds:
                base = found[f"{kind}/off"]
                for draft in ("off", "ngram", store.name):
                    runs = found[f"{kind}/{draft}"]
                    assert all(
                        a["token_ids"] == b["token_ids"] for a, b in zip(runs, base, strict=True)
                    )
                    speed, without = (
                        statistics.median(run["tokens_per_second"] for run in each)
                        for each in (runs, base)
                    )
                    rows.append(
                        {"where": name, "text": kind, "drafts": draft, "tokens_per_second": speed,
                         "times_without": speed / without,
                         "drafted": sum(run["drafted"] for run in runs),
                         "accepted": sum(run["accepted"] for run in runs),
                         "flash_bytes_per_token": statistics.median(
                             run["flash_bytes_per_token"] for run in runs)}
                    )  # fmt: skip
    return rows, named


def demo_texts():
    """{kind: prompts of 40 tokens}: of source files of this repository, and of its English."""
    files = sorted((EXAMPLES / "flashinfer").rglob("*.py"))
    english = [EXAMPLES / "README.md", *sorted((EXAMPLES / "docs").glob("*.md"))]
    with Bundle(demo_model()) as bundle:
        tokenizer = Tokenizer(bundle)
    prompts = {
        "Python source": [tokenizer.encode(f.read_text()[:800])[:40] for f in files[2:60:6]],
        "English": [tokenizer.encode(f.read_text()[200:1000])[:40] for f in english[:8]],
        "for the store": [tokenizer.encode(f.read_text()[:800])[:40] for f in files[3:200:3]],
    }
    tokenizer.close()
    return {kind: [ids for ids in found if len(ids) == 40] for kind, found in prompts.items()}


def measured_profile(folder):
    """The path of a profile of this disk: the one that flashinfer probe left, or a new one."""
    path = folder / "profile.json"
    save(probe(folder), path)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default=".", type=Path, help="where models are made")
    parser.add_argument("--only", default="streamed,demo,mixtures")
    parser.add_argument("--keep", action="store_true", help="leave the models there")
    parser.add_argument("--quick", action="store_true", help="fewer tokens, and once")
    add_json(parser)
    args = parser.parse_args()
    parts, figures = args.only.split(","), {"machine": machine()}
    print(f"{machine()}; medians\n")
    try:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            device = measured_profile(Path(folder))
            if {"streamed", "mixtures"} & set(parts):
                print(
                    "| model | right | tokens/s | of without | read per token | drafted | right | "
                    "passes | a pass took | expected |\n|---|---|---|---|---|---|---|---|---|---|"
                )
                cases = STREAMED * ("streamed" in parts) + MIXTURES * ("mixtures" in parts)
                figures["known"] = known(args, cases, device)
            if "demo" in parts:
                figures["demo"], figures["named"] = demo(args, device)
                print(
                    f"\nthe store alone names {100 * figures['named']:.0f} % of the tokens of "
                    "texts left out\n\n| where | text | drafts | tokens/s | of without | drafted | "
                    "right |\n|---|---|---|---|---|---|---|"
                )
                for row in figures["demo"]:
                    print(f"| {row['where']} | {row['text']} | {row['drafts']} | "
                          f"{row['tokens_per_second']:.0f} | {row['times_without']:.2f} | "
                          f"{row['drafted']} | {row['accepted']} |")  # fmt: skip
    except NoCgroups as error:
        raise SystemExit(f"skipped: {error}") from None
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
