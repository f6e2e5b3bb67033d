"""Print a hash of the logits and of each layer's output: the same on every machine."""

from argparse import ArgumentParser, Namespace

from flashinfer.cli.common import add_json, progress_bars, write_json
from flashinfer.cli.model_options import add_model_arguments, open_model
from flashinfer.cli.prompt import add_text_arguments, ids_of_text
from flashinfer.oracle.digest import digest


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    add_text_arguments(parser)
    add_model_arguments(parser)
    add_json(parser)


def main(args: Namespace) -> None:
    ids = ids_of_text(args)
    with (
        progress_bars() as progress,
        open_model(args, args.model, len(ids), progress=progress) as model,
    ):
        found = digest(model, ids, progress)
        mode = model.plan.mode
    if args.json != "-":
        for name, hash in found.items():
            print(f"{hash}  {name}")
    write_json(args.json, {"neurons": mode, "tokens": ids, "digests": found})
