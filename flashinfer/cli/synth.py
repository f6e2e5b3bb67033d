"""Write a synthetic model of a real one's shape, to see what a board would do."""

import sys
from argparse import ArgumentParser, Namespace

from flashinfer.cli.common import (
    add_dtypes,
    add_json,
    positive,
    progress_bars,
    seed,
    share,
    write_json,
)
from flashinfer.formats.architectures import model_config
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.errors import UserError
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import NAMES, config_like, opt_config


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("destination", metavar="DST", help="the bundle to write, such as x.flash")
    parser.add_argument(
        "--like", choices=NAMES, metavar="NAME", help=f"a published shape: {', '.join(NAMES)}"
    )
    for name, meaning in (
        ("hidden-size", "width of the hidden states"), ("layers", "how many"),
        ("heads", "attention heads"), ("ffn-dim", "neurons a layer; default: 4 x hidden size"),
        ("vocab-size", "tokens (50272)"), ("context", "positions (2048)"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=meaning)
    add_dtypes(parser)
    parser.add_argument("--active", type=share, default=0.03, metavar="SHARE",
                        help="of a layer's neurons that fire for a token (0.03)")  # fmt: skip
    parser.add_argument("--fresh", type=share, default=0.024, metavar="SHARE",
                        help="of the layer that is new at a token, after five (0.024)")  # fmt: skip
    parser.add_argument("--repeated", type=share, default=0.4, metavar="SHARE", help="of a "
                        "token's experts that the token before used, too (0.4)")  # fmt: skip
    parser.add_argument("-s", "--seed", type=seed, default=0)
    add_json(parser)


def main(args: Namespace) -> None:
    config = wanted_config(args)
    with progress_bars() as progress:
        calibration = synthesize(
            args.destination,
            config,
            args.dtype,
            args.active,
            args.fresh,
            args.seed,
            progress,
            args.dense_dtype,
            args.repeated,
        )
    found = zip(calibration.layers, model_config(config).layers, strict=True)
    record, ffn = next((record, layer.ffn) for record, layer in found if record)
    if ffn.router:
        print(
            f"{args.destination}: {ffn.router.experts_per_token} of {ffn.experts} experts for a "
            f"token; five tokens need {record.window_rows[4]:.0f} of them a layer",
            file=sys.stderr,
        )
    else:
        print(
            f"{args.destination}: {100 * record.active:.1f} % of the neurons fire for a token, "
            f"{100 * record.predicted:.1f} % are predicted; five tokens need "
            f"{record.window_rows[4]:.0f} of {ffn.neurons} neurons a layer",
            file=sys.stderr,
        )
    write_json(args.json, {"config": config, "calibration": calibration.as_json()})


def wanted_config(args: Namespace) -> JsonObject:
    """The Hugging Face config of a published shape, or of an OPT with the given dimensions."""
    given = [args.hidden_size, args.layers, args.heads, args.ffn_dim, args.vocab_size]
    if args.like:
        if any(given):
            raise UserError("--like gives all dimensions but --context; leave the others out")
        return config_like(args.like, args.context or 2048)
    if not args.hidden_size or not args.layers:
        raise UserError("give --like, or --hidden-size and --layers")
    heads = args.heads or max(1, args.hidden_size // 64)
    neurons = args.ffn_dim or 4 * args.hidden_size
    return opt_config(
        args.hidden_size, args.layers, heads, neurons, args.vocab_size or 50272,
        args.context or 2048,
    )  # fmt: skip
