"""Check every byte of a bundle against its checksums."""

from argparse import ArgumentParser, Namespace

from flashinfer.cli.common import add_json, progress_bars, write_json
from flashinfer.formats.bundle.reader import Bundle, verify


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    add_json(parser)


def main(args: Namespace) -> None:
    with progress_bars() as progress:
        size = verify(args.model, progress)
    with Bundle(args.model) as bundle:
        others = ", ".join(file.name for file in bundle.in_place.files)
    if args.json != "-":
        print(f"{args.model}: {size:,} bytes, every checksum is right")
        if others:
            print(f"Its weights in {others} have no checksums; samples are as they were.")
    write_json(args.json, {"model": str(args.model), "bytes": size, "sound": True})
