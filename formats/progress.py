"""How long work tells its caller how far it is."""

from typing import Protocol


class Progress(Protocol):
    """A function that is called again and again while work goes on.

    what   one word for the work, such as "load" or "write"
    done   how much of ``total`` is done: bytes, layers, tokens, or a share
    total  the same of all of it; the last call of each work has ``done == total``
    """

    def __call__(self, what: str, done: float, total: float) -> None: ...


def no_progress(what: str, done: float, total: float) -> None:
    """The Progress of a caller who does not want to be told."""
