"""Write every intermediate value of a run to a safetensors file, or summaries of them."""

from argparse import ArgumentParser, Namespace

from flashinfer.cli.common import positions, progress_bars
from flashinfer.cli.model_options import add_model_arguments, open_model
from flashinfer.cli.prompt import add_text_arguments, ids_of_text
from flashinfer.oracle.trace import trace


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    add_text_arguments(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN",
        help="values whose names match, such as '*.mlp*' or logits; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--positions", type=positions, metavar="LIST", help="of these tokens, such as 0,5,10-20"
    )
    parser.add_argument(
        "--summary", action="store_true",
        help="of each value a digest, moments, extremes and a sample: kilobytes",
    )  # fmt: skip
    add_model_arguments(parser)


def main(args: Namespace) -> None:
    ids = ids_of_text(args)
    with (
        progress_bars() as progress,
        open_model(args, args.model, len(ids), progress=progress) as model,
    ):
        trace(model, ids, args.output, args.only, args.positions, args.summary, progress)
