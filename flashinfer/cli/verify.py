"""Check every byte of a bundle against its checksums."""

import os

from flashinfer.cli.common import add_json, byte_bar, write_json
from flashinfer.formats.bundle import reader as bundle


def add_arguments(parser):
    parser.add_argument("model", metavar="MODEL")
    add_json(parser)


def main(args):
    total = os.path.getsize(args.model) if os.path.exists(args.model) else 0
    with byte_bar("verify") as progress:
        size = bundle.verify(args.model, lambda more: progress(more, total))
    if args.json != "-":
        print(f"{args.model}: {size:,} bytes, every checksum is right")
    write_json(args.json, {"model": str(args.model), "bytes": size, "sound": True})
