"""The process of the command ``flashinfer``: its streams, its signals, its exit code.

What is imported before ``main`` is little, so that Ctrl-C is answered in one line from the start.
"""

import os
import sys


def main():
    """Run the command line of this process, and exit with its code."""
    try:
        import signal

        # A shell may have switched it off for what runs in the background.
        answers = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if answers:
            signal.signal(signal.SIGINT, _leave)
        _open_streams()
        from flashinfer.cli.main import main as command

        if answers:
            signal.signal(signal.SIGINT, _interrupt)
        code = command()
        if answers:  # all is done; the interpreter's own end is not to be cut short
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        _leave()
    sys.exit(code)


def _leave(*_):
    """End at once: nothing is half done where this is called, and an exception could be lost."""
    os.write(2, b"\nflashinfer: interrupted\n")
    os._exit(130)


def _interrupt(*_):
    sys.unraisablehook = _lost
    raise KeyboardInterrupt


def _lost(unraisable):
    """After an interrupt, an exception where Python has nobody to tell, as in ``__del__``.

    What was interrupted while it was made may complain when it is destroyed, which says nothing to
    the user; an interrupt that came just there is repeated.
    """
    import signal
    import threading

    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, signal.raise_signal, [signal.SIGINT]).start()


def _open_streams():
    """Give the process all of its standard streams.

    A stream that was closed would let the next file that is opened take its number, and what is
    meant for the user be written there. Without an input there is nothing to read; what cannot be
    written to stdout is an error, and what cannot be said on stderr is not.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the least number that is free
    import io

    class Stream(io.FileIO):
        def write(self, data):
            try:
                return super().write(data)
            except OSError as error:
                if self.fileno() == 2:
                    return len(data)
                error.filename = "standard output"
                raise

    def opened(number, like):
        encoding, terminal = getattr(like, "encoding", None), os.isatty(number)
        file = io.BufferedWriter(Stream(number, "w", closefd=False))
        return io.TextIOWrapper(
            file, encoding, errors="replace", line_buffering=terminal or number == 2
        )

    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdin.reconfigure(errors="replace")
    sys.stdout, sys.stderr = opened(1, sys.stdout), opened(2, sys.stderr)


if __name__ == "__main__":
    main()
