"""Make a bundle of a Hugging Face checkpoint or a GGUF file."""

import sys
from argparse import ArgumentParser, Namespace

from flashinfer.cli.common import add_dtypes, add_json, progress_bars, write_json
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import convert


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="the checkpoint's directory, its name "
                        "on the Hugging Face Hub (org/name, or org/name:Q4_K_M for a GGUF file "
                        "there), or x.gguf; of several files the first")  # fmt: skip
    parser.add_argument("destination", metavar="DST", help="the bundle to write, such as x.flash")
    add_dtypes(parser, None, "f16; of a GGUF file, as they are there")
    parser.add_argument(
        "--activation", metavar="NAME", help="of a GGUF file, which does not state it: relu for a "
        "model that was trained with a ReLU; default: what its architecture usually has",
    )  # fmt: skip
    parser.add_argument(
        "--low-disk", action="store_true", help="of a checkpoint on the Hub: download shard by "
        "shard, and delete each when it is converted",
    )  # fmt: skip
    parser.add_argument(
        "--in-place", action="store_true", help="of a GGUF file: leave its weights where they are, "
        "and write what else a model needs to DST, which lies beside it; flashinfer run x.gguf "
        "does so by itself",
    )  # fmt: skip
    add_json(parser)


def main(args: Namespace) -> None:
    notes: list[str] = []
    with progress_bars() as progress:
        size = convert(
            args.source, args.destination, args.dtype, progress, args.dense_dtype,
            args.activation, args.low_disk, notes.append, in_place=args.in_place,
        )  # fmt: skip
    with Bundle(args.destination) as bundle:
        name, sparse = bundle.ffn_formats, bundle.config.sparse
        activation, experts = bundle.config.activations, bundle.config.mixture
        encoder, needs_all = bundle.config.encoder, bundle.config.needs_all
        whole = sparse and any(layer.ffn.matrices for layer in bundle.config.layers)
    stay = f"; its other weights stay in {args.source}" if args.in_place else ""
    print(f"{args.destination}: {size / 1e6:,.1f} MB, {name}{stay}", file=sys.stderr)
    for line in notes:
        print(line, file=sys.stderr)
    if whole:
        print(
            "Its experts are read whole, as their matrices are kept bit for bit; with --dtype "
            "their neurons lie apart, and calibrate finds which of them a token needs",
            file=sys.stderr,
        )
    if encoder:
        print(f"Next: flashinfer encode {args.destination} -p TEXT", file=sys.stderr)
    elif sparse or experts:
        print(f"Next: flashinfer calibrate {args.destination} --text FILE", file=sys.stderr)
    elif needs_all:
        print("Its feed-forward networks are always used whole.", file=sys.stderr)
    else:
        print(
            f"Its activation, {activation}, leaves no neuron silent: it runs with all of them; "
            "flashinfer calibrate --target-sparsity SHARE takes some as silent",
            file=sys.stderr,
        )
    write_json(args.json, {"model": args.destination, "bytes": size, "number_format": name})
