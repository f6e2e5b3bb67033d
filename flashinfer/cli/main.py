"""The command ``flashinfer``: one file a subcommand; here errors become one line and a code."""

import argparse
import os
import sys
from importlib import import_module
from io import TextIOWrapper

from flashinfer import __version__
from flashinfer.formats.errors import UserError

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
    # What an encoding cannot show is replaced, of texts as of names.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        argv = sys.argv[1:] if argv is None else argv
        # Only what is asked for is imported: modules take memory, too.
        commands = argv[:1] if argv and argv[0] in COMMANDS else COMMANDS
        args = make_parser(commands).parse_args(argv)
        code = args.main(args)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        print("\nflashinfer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; nothing is left to say, nor to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as error:
        message = str(error)
    except MemoryError:
        message = "out of memory; give a smaller --memory, or a smaller context"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = UserError(f"{where}{error.strerror or error}")
    print(f"flashinfer: error: {message}", file=sys.stderr)
    return 1
