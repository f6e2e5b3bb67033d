"""The command ``flashinfer``: one file per subcommand. Here errors become one line and a code."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from flashinfer import __version__
from flashinfer.cli.common import NotConforming, check_outputs
from flashinfer.formats.errors import UserError, printable
from flashinfer.plan.companion import bundle_at

COMMANDS = (
    "run",
    "chat",
    "batch",
    "encode",
    "surrogate",
    "convert",
    "calibrate",
    "evaluate",
    "trace",
    "compare",
    "digest",
    "kit",
    "plan",
    "probe",
    "report",
    "inspect",
    "verify",
    "synth",
    "study",
    "watch",
    "check",
)

# Those that open their model as a bundle, which stands beside a GGUF file.
OPENING = (
    "run", "chat", "batch", "encode", "surrogate", "calibrate", "evaluate", "digest", "inspect",
    "verify", "study", "watch",
)  # fmt: skip


def make_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The argparse parser, with a subparser for each command."""
    parser = argparse.ArgumentParser(
        prog="flashinfer",
        description="Language models larger than memory, run from flash storage.",
    )
    parser.add_argument("--version", action="version", version=f"flashinfer {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in commands:
        module = import_module(f"flashinfer.cli.{name}")
        help, _, more = (module.__doc__ or "").partition("\n")
        subparser = subparsers.add_parser(name, help=help, description=help, epilog=more.strip())
        module.add_arguments(subparser)
        subparser.set_defaults(main=module.main)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line; return its exit code: 0, 1 error, 2 usage, 130 Ctrl-C.

    argv  the arguments; None: those of this process
    """
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except NotConforming:
        sys.stdout.flush()
        return 1
    except KeyboardInterrupt:
        print("\nflashinfer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard_output()  # nobody reads the output any more
        return 141
    except UserError as error:
        message = str(error)
    except MemoryError:
        message = "out of memory; give a smaller --memory, or a smaller context"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = printable(f"{where}{error.strerror or error}")
    try:
        sys.stdout.flush()
    except OSError:  # the message may be about this very error
        _discard_output()
    print(f"flashinfer: error: {message}", file=sys.stderr)
    return 1


def _run(argv: list[str]) -> int:
    """Run a command line; return its exit code. argparse prints usage errors and --help."""
    # Only the command's own module is imported, because modules take memory.
    commands = argv[:1] if argv and argv[0] in COMMANDS else COMMANDS
    try:
        args = make_parser(commands).parse_args(argv)
    except SystemExit as exit:
        return int(exit.code or 0)
    check_outputs(args)
    if args.command in OPENING and args.model is not None:
        args.model = str(bundle_at(args.model, silent=False))
    args.main(args)
    return 0


def _discard_output() -> None:
    """Send what stdout still holds nowhere, so that the interpreter's exit does not write it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
