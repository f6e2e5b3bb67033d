"""Repeat the paper's experiments on a model: tables, figures as JSON, and a page with charts.

Experiments: sparsity (how few neurons a token uses), windows (what keeping the last tokens' neurons
saves), blocks (what a read costs by its size), predictors (by rank, and on other texts), bundling
(for other shapes), batches (what tokens share), coactivation (neurons beside those that they fire
with), portability (other machines), tables (the paper's, theirs and ours), failed (ideas that do
not pay); or all. Without --text the texts are Python's own library
(every 50th file, which the demo model was not trained on), its documentation in English, and random
characters.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from flashinfer.cli.common import (
    add_json,
    open_bundle,
    positive,
    progress_bars,
    text_ids,
    write_json,
)
from flashinfer.cli.model_options import add_model_arguments, options_of
from flashinfer.cli.recording import measured_device
from flashinfer.cli.run import demo_model
from flashinfer.formats.errors import UserError
from flashinfer.formats.files import replacing
from flashinfer.formats.progress import Progress
from flashinfer.study.activity import Sample, Study
from flashinfer.study.findings import Finding
from flashinfer.study.page import page
from flashinfer.text.own_texts import own_texts
from flashinfer.text.tokenizer import Tokenizer

EXPERIMENTS = (
    "sparsity",
    "windows",
    "blocks",
    "predictors",
    "bundling",
    "batches",
    "coactivation",
    "portability",
    "tables",
    "failed",
)
CONTEXT = 1024
LEAST_TOKENS = 256


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", choices=(*EXPERIMENTS, "all"), metavar="NAME",
                        help=f"one of {', '.join(EXPERIMENTS)}, or all")  # fmt: skip
    parser.add_argument("model", nargs="?", metavar="MODEL", help="default: the demo model")
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE",
                        help="UTF-8 texts; the first stands for all where one will do")  # fmt: skip
    parser.add_argument("--tokens", type=positive, default=2048, metavar="N",
                        help="of each text to use (2048)")  # fmt: skip
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page with charts")
    add_model_arguments(parser)
    add_json(parser)


def main(args: Namespace) -> None:
    args.model = Path(args.model or demo_model())
    names = EXPERIMENTS if args.name == "all" else (args.name,)
    with progress_bars() as progress:
        study = _study(args, progress)
        findings: list[Finding] = []
        left_out: dict[str, str] = {}
        for name in names:
            try:
                findings.append(experiment(name)(study))
            except UserError as error:
                if args.name != "all":
                    raise
                left_out[name] = str(error)  # what this model has not
                print(f"flashinfer: {name} is left out: {error}", file=sys.stderr)
                continue
            if args.json != "-":
                print("\n".join(findings[-1].lines()), end="\n\n", flush=True)
    if args.html:
        made = f"{args.model.name}; {study.profile.name}; {time.strftime('%Y-%m-%d')}"
        with replacing(args.html) as file:
            file.write(page(f"A study of {args.model.name}", made, findings).encode())
    write_json(
        args.json,
        {
            "model": str(args.model),
            "device": study.profile.name,
            "findings": [found.as_dict() for found in findings],
            "left_out": left_out,
        },
    )


def experiment(name: str) -> Callable[[Study], Finding]:
    """What runs the experiment of this name."""
    run: Callable[[Study], Finding] = import_module(f"flashinfer.study.experiments.{name}").run
    return run


def _study(args: Namespace, progress: Progress) -> Study:
    """The Study that the arguments name; a device that nobody measured is measured now."""
    with open_bundle(args.model, args.memory) as bundle:
        tokenizer, config = Tokenizer(bundle, args.memory), bundle.config
    context = min(CONTEXT, config.max_position_embeddings)
    samples = [
        Sample(path.name, text_ids(path, tokenizer, args.tokens)) for path in args.text
    ]  # fmt: skip
    if not samples:
        samples = [
            Sample(name, tokenizer.encode(text[: 12 * args.tokens])[: args.tokens])
            for name, text in own_texts().items()
        ]
    tokenizer.close()
    for sample in samples:
        if len(sample.ids) < LEAST_TOKENS:
            raise UserError(
                f"{sample.name}: has {len(sample.ids)} tokens; an experiment takes at least "
                f"{LEAST_TOKENS}"
            )
    device = measured_device(args, args.model, progress)
    options = replace(options_of(args, context=context), device=device)
    return Study(args.model, samples, options, device, progress)
