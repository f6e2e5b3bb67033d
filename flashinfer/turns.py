"""Who may use a model: one thread, and one text, at a time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flashinfer.formats.errors import UserError


class Turns:
    """Gives a model to one caller after the other.

    closed  a function without arguments: whether the model is closed
    """

    def __init__(self, closed: Callable[[], bool]) -> None:
        self.closed = closed
        self.lock = threading.RLock()  # held by the thread that computes
        self.computing = False
        self.begun: object | None = None  # the generation that the key/value cache belongs to

    @contextmanager
    def alone(self, text: object | None = None) -> Iterator[None]:
        """The model for this thread, which begins something new or goes on with ``text``.

        Raises UserError where another thread computes, or this one in what called this, the model
        is closed, or another text has been begun meanwhile.
        """
        if not self.lock.acquire(blocking=False):
            raise UserError("the model is in use by another thread; it serves one at a time")
        try:
            self.refuse_within()
            if self.closed():
                raise UserError("the model is closed")
            if text is not None and text is not self.begun:
                raise UserError("another text was begun with this model; this one cannot go on")
            self.begun = text
            try:
                self.computing = True
                yield
            finally:
                self.computing = False
        finally:
            self.lock.release()

    def refuse_within(self) -> None:
        """Raise UserError where a callback of the model's own calls the model."""
        if self.computing:
            raise UserError("the model is computing; what it calls meanwhile cannot use it")
