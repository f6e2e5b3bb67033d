"""The command ``flashinfer``: one file a subcommand; here errors become one line and a code."""

import argparse
import os
import sys
from importlib import import_module

from flashinfer import __version__
from flashinfer.cli.common import check_outputs
from flashinfer.formats.errors import UserError, printable

COMMANDS = (
    "run",
    "chat",
    "convert",
    "calibrate",
    "evaluate",
    "plan",
    "probe",
    "inspect",
    "verify",
    "synth",
)


def make_parser(commands=COMMANDS):
    """The argparse parser, with a subparser of each command."""
    parser = argparse.ArgumentParser(
        prog="flashinfer",
        description="Language models larger than memory, run from flash storage.",
    )
    parser.add_argument("--version", action="version", version=f"flashinfer {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in commands:
        module = import_module(f"flashinfer.cli.{name}")
        help, _, more = module.__doc__.partition("\n")
        subparser = subparsers.add_parser(name, help=help, description=help, epilog=more.strip())
        module.add_arguments(subparser)
        subparser.set_defaults(main=module.main)
    return parser


def main(argv=None):
    """Run a command line; return its exit code: 0, 1 error, 2 usage, 130 Ctrl-C."""
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nflashinfer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard_output()  # its reader has gone; nothing is left to say
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
    except OSError:  # which may be what the message says
        _discard_output()
    print(f"flashinfer: error: {message}", file=sys.stderr)
    return 1


def _run(argv):
    """The exit code of a command line that is right; usage errors and --help are argparse's."""
    # Only what is asked for is imported: modules take memory, too.
    commands = argv[:1] if argv and argv[0] in COMMANDS else COMMANDS
    try:
        args = make_parser(commands).parse_args(argv)
    except SystemExit as exit:
        return exit.code
    check_outputs(args)
    return args.main(args) or 0


def _discard_output():
    """What stdout still holds goes nowhere, so that it is not tried again at the exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
