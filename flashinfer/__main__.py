"""The process of the command ``flashinfer``: its streams, its signals, its exit code.

Little is imported before ``main``, so that Ctrl-C is answered in one line from the start.
"""

import os
import sys
from types import FrameType
from typing import Any

INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended, as a shell has it


def main() -> None:
    """Run the command line of this process, and exit with its code."""
    try:
        import signal

        # A shell may have switched Ctrl-C off for a process in the background.
        answers = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if answers:
            signal.signal(signal.SIGINT, _leave)
        _open_streams()
        from flashinfer.cli.main import main as command

        if answers:
            signal.signal(signal.SIGINT, _interrupt)
        code = command()
        if answers:  # all work is done; Ctrl-C must not interrupt the interpreter's own exit
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if code == INTERRUPTED:
            # If the interrupt came within exec(), as when a dataclass is made, ``python -m`` would
            # end with the signal instead of this code.
            sys.stdout.flush()
            os._exit(code)
    except KeyboardInterrupt:
        _leave()
    sys.exit(code)


def _leave(signal_number: int = 0, frame: FrameType | None = None) -> None:
    """Exit at once. Nothing is half done where this is called, and an exception could be lost."""
    os.write(2, b"\nflashinfer: interrupted\n")
    os._exit(INTERRUPTED)


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    sys.unraisablehook = _lost
    raise KeyboardInterrupt


def _lost(unraisable: "sys.UnraisableHookArgs") -> None:
    """Handle an exception that Python cannot raise, such as one in ``__del__``, after an interrupt.

    An object whose making was interrupted may fail when it is destroyed; such an error tells the
    user nothing. An interrupt that arrived in such a place is repeated.
    """
    import signal
    import threading

    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, signal.raise_signal, [signal.SIGINT]).start()


def _open_streams() -> None:
    """Give the process all of its standard streams.

    If a stream were closed, the next file to be opened would take its number, and messages for the
    user would be written to that file. A closed stdin reads as empty. Failing to write to stdout is
    an error, failing to write to stderr is not.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the least number that is free
    import io

    class Stream(io.FileIO):
        def write(self, data: Any) -> int:
            try:
                return super().write(data)
            except OSError as error:
                if self.fileno() == 2:
                    return len(data)
                error.filename = "standard output"
                raise

    def opened(number: int, like: Any) -> io.TextIOWrapper:
        encoding, terminal = getattr(like, "encoding", None), os.isatty(number)
        file = io.BufferedWriter(Stream(number, "w", closefd=False))
        return io.TextIOWrapper(
            file, encoding, errors="replace", line_buffering=terminal or number == 2
        )

    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    sys.stdout, sys.stderr = opened(1, sys.stdout), opened(2, sys.stderr)


if __name__ == "__main__":
    main()
