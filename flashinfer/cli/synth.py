"""Write a synthetic model of a real one's shape, to see what a board would do."""

import sys

from flashinfer.cli.common import add_dtypes, add_json, byte_bar, positive, share, write_json
from flashinfer.formats.errors import UserError
from flashinfer.synth import OPT_SHAPES, opt_config, synthesize


def add_arguments(parser):
    parser.add_argument("destination", metavar="DST", help="the bundle to write, such as x.flash")
    parser.add_argument("--like", choices=OPT_SHAPES, help="a published shape")
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
    parser.add_argument("-s", "--seed", type=int, default=0)
    add_json(parser)


def main(args):
    hidden, layers, heads, ffn = OPT_SHAPES.get(args.like, (None,) * 4)
    hidden, layers = args.hidden_size or hidden, args.layers or layers
    if hidden is None or layers is None:
        raise UserError("give --like, or --hidden-size and --layers")
    heads = args.heads or (heads if not args.hidden_size else max(1, hidden // 64))
    ffn = args.ffn_dim or (ffn if not args.hidden_size else 4 * hidden)
    config = opt_config(hidden, layers, heads, ffn, args.vocab_size or 50272, args.context or 2048)
    with byte_bar("synth") as progress:
        calibration = synthesize(
            args.destination,
            config,
            args.dtype,
            args.active,
            args.fresh,
            args.seed,
            progress,
            args.dense_dtype,
        )
    record = calibration["layers"][0]
    print(
        f"{args.destination}: {100 * record['active']:.1f} % of the neurons fire for a token, "
        f"{100 * record['predicted']:.1f} % are predicted; five tokens need "
        f"{record['window_rows'][4]:.0f} of {ffn} rows a layer",
        file=sys.stderr,
    )
    write_json(args.json, {"config": config, "calibration": calibration})
