"""Mistakes that a user can mend. Each message is one line: what, where, and what would be right."""

import reprlib

MOST_MESSAGE, MOST_SHOWN = 1000, 60  # characters of a message, of a value in it


def printable(value, most=MOST_MESSAGE):
    """``value`` as text of at most ``most`` characters, without control characters, which a file
    could send to the terminal.

    What cannot be printed becomes a "?"; what is longer loses its middle, as the file's name stands
    at the beginning and what is wrong at the end.
    """
    text = str(value)
    if len(text) > most:
        text = f"{text[: most - most // 2 - 3]}...{text[len(text) - most // 2 :]}"
    return "".join(c if c.isprintable() else "?" for c in text)


def shown(value):
    """A value from a file as an error message can hold it: a few words, however deep it goes."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = MOST_SHOWN
    text = short.repr(value)
    return text if len(text) <= MOST_SHOWN + 2 else f"{text[:MOST_SHOWN]}..."


def reason(error):
    """The first line of what an exception says, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line and says why.

    Names that a file gives may hold anything: the message is made ``printable``.
    """

    def __init__(self, message=""):
        super().__init__(printable(message))


class FormatError(UserError):
    """A file is not what it should be: cut, damaged, hostile, or of another kind."""


class BudgetError(UserError):
    """The memory budget is too small; ``least`` is the smallest that works, in bytes."""

    def __init__(self, message, least):
        super().__init__(message)
        self.least = least
