"""Check every byte of a bundle against its checksums."""

from argparse import ArgumentParser, Namespace

from flashinfer.cli.common import add_json, progress_bars, write_json
from flashinfer.formats.bundle.reader import verify


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    add_json(parser)


def main(args: Namespace) -> None:
    with progress_bars() as progress:
        size = verify(args.model, progress)
    if args.json != "-":
        print(f"{args.model}: {size:,} bytes, every checksum is right")
    write_json(args.json, {"model": str(args.model), "bytes": size, "sound": True})
