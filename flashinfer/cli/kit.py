"""Write a conformance kit, by which other engines are checked, or check one.

A kit is a directory of tiny models of every architecture with the logits and traces that are right,
of encoded numbers, tokenizers, chat templates and samplers; see docs/kits.md. It is the same, to
the last byte, on every machine.
"""

import sys
from argparse import ArgumentParser, Namespace

from flashinfer.cli.common import add_json, progress_bars, write_json
from flashinfer.formats.errors import UserError
from flashinfer.oracle.kits.check import check_kit
from flashinfer.oracle.kits.kit import write_kit


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="a new directory, or with --check a kit")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--arch", nargs="+", default=[], metavar="NAME",
        help="models of these architectures only, such as llama qwen2_moe; default: all",
    )  # fmt: skip
    what.add_argument(
        "--check", action="store_true",
        help="check every hash of a kit, and that this engine gives what it says is right",
    )  # fmt: skip
    add_json(parser)


def main(args: Namespace) -> None:
    if args.check:
        check(args)
    else:
        write(args)


def write(args: Namespace) -> None:
    with progress_bars() as progress:
        manifest = write_kit(args.directory, args.arch, progress)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    figures = {
        "kit": args.directory,
        "version": manifest["version"],
        "models": len(manifest["models"]),
        "files": len(manifest["files"]),
        "bytes": size,
    }
    print(
        f"{args.directory}: {figures['models']} models, {figures['files']} files, "
        f"{size / 1e6:.1f} MB",
        file=sys.stderr,
    )
    write_json(args.json, figures)


def check(args: Namespace) -> None:
    with progress_bars() as progress:
        found = check_kit(args.directory, progress)
    for line in [*found.differences, *(f"not checked: {part}" for part in found.not_checked)]:
        print(line, file=sys.stderr)
    write_json(args.json, {
        "kit": args.directory, "version": found.version, "models": found.models,
        "files": found.files, "differences": found.differences, "not_checked": found.not_checked,
    })  # fmt: skip
    if found.differences:
        raise UserError(f"{args.directory}: {len(found.differences)} differences, see above")
    if args.json != "-":
        print(f"{args.directory}: {found.files} files and {found.models} models are right")
