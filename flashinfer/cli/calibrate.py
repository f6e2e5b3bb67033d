"""Find which neurons fire on a text, and write predictors into a bundle."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from flashinfer.calibration.calibrate import LAYOUTS, OTHERS, calibrate
from flashinfer.calibration.predictor_training import CHOICES
from flashinfer.cli.common import (
    add_json,
    natural,
    open_bundle,
    positive,
    progress_bars,
    share,
    size,
    text_ids,
    write_json,
)
from flashinfer.cli.inspect import print_calibration
from flashinfer.formats.bundle.calibration import METHODS
from flashinfer.text.own_texts import of_other_kinds
from flashinfer.text.tokenizer import Tokenizer


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text like the texts "
                        "that the model will be used for")  # fmt: skip
    parser.add_argument("-o", "--output", metavar="DST", help="default: replace MODEL")
    parser.add_argument("--tokens", type=positive, default=8192, metavar="N",
                        help="of the text to use (8192)")  # fmt: skip
    parser.add_argument("--only-text", action="store_true", help="calibrate on the text alone; "
                        "default: a quarter of the tokens are Python's library, its documentation "
                        "in English and random characters, so that predictors name what fires on "
                        "unfamiliar text, too")  # fmt: skip
    parser.add_argument("--missed", type=share, default=0.05, metavar="SHARE",
                        help="of the active neurons that may be missed (0.05)")  # fmt: skip
    parser.add_argument("--steps", type=natural, default=300, metavar="N",
                        help="of training a layer after the SVD (300)")  # fmt: skip
    parser.add_argument(
        "--predictor", choices=(*CHOICES, "none"), default="better", help="which to keep; default: "
        "of those that miss no more than --missed, the one that predicts fewer neurons; none: for "
        "a mixture with a ReLU, find only which experts are used",
    )  # fmt: skip
    parser.add_argument("--predictor-from", metavar="SRC", help="take PowerInfer's: a "
                        "directory with one model_N.pt a layer, or its GGUF file")  # fmt: skip
    parser.add_argument("--target-sparsity", type=share, metavar="SHARE", help="of a layer's "
                        "neurons to take as silent, for models such as Llama whose activation "
                        "leaves none silent; run --neurons predicted puts it in force")  # fmt: skip
    parser.add_argument("--method", choices=METHODS, default="cats", help="which neurons are taken "
                        "as silent: those with the least gates, the smallest activations, or the "
                        "smallest contributions (cats)")  # fmt: skip
    parser.add_argument("--layout", choices=LAYOUTS, default="trained", help="the neurons' order "
                        "in the file: as trained, or each beside those that it fires with, so that "
                        "one read brings several (trained)")  # fmt: skip
    parser.add_argument("--memory", type=size, metavar="SIZE", help="budget of the whole process")
    parser.add_argument("-t", "--threads", type=positive, help="default: the cores there are")
    add_json(parser)


def main(args: Namespace) -> None:
    with open_bundle(args.model, args.memory, calibrated=False) as bundle:
        tokenizer = Tokenizer(bundle, args.memory)
    others = [] if args.only_text else of_other_kinds(tokenizer, args.tokens // OTHERS)
    ids = text_ids(args.text, tokenizer, args.tokens)
    with progress_bars() as progress:
        found = calibrate(
            args.model, ids, args.output, Path(args.text).name, args.tokens, args.missed,
            args.steps, args.memory, args.threads, progress, args.target_sparsity, args.method,
            args.predictor, args.predictor_from, others, args.layout,
        )  # fmt: skip
    if args.json != "-":
        print_calibration(found)
    write_json(args.json, found.as_json())
