"""Make a bundle of a Hugging Face checkpoint."""

import sys

from flashinfer.cli.common import add_dtypes, add_json, byte_bar, write_json
from flashinfer.formats import convert as converter


def add_arguments(parser):
    parser.add_argument("source", metavar="SRC", help="the checkpoint's directory")
    parser.add_argument("destination", metavar="DST", help="the bundle to write, such as x.flash")
    add_dtypes(parser)
    add_json(parser)


def main(args):
    with byte_bar("convert") as progress:
        size = converter.convert(
            args.source, args.destination, args.dtype, progress, args.dense_dtype
        )
    print(
        f"{args.destination}: {size / 1e6:,.1f} MB. Next: flashinfer calibrate "
        f"{args.destination} --text FILE",
        file=sys.stderr,
    )
    write_json(args.json, {"model": args.destination, "bytes": size, "number_format": args.dtype})
