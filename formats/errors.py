"""Errors that a user can correct. A message is one line: where, what, and what would be right."""

import reprlib

MOST_MESSAGE, MOST_SHOWN = 1000, 60  # characters of a message, and of a value within it


def printable(value: object, most: int = MOST_MESSAGE) -> str:
    """``value`` as text of at most ``most`` characters, without control characters.

    A file could send control characters to the terminal; each unprintable one becomes a "?". Text
    that is too long loses its middle, because a message begins with the file's name and ends with
    what is wrong.
    """
    text = str(value)
    if len(text) > most:
        text = f"{text[: most - most // 2 - 3]}...{text[len(text) - most // 2 :]}"
    return "".join(c if c.isprintable() else "?" for c in text)


def shown(value: object) -> str:
    """A value from a file, shortened for an error message however deeply it is nested."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = MOST_SHOWN
    text = short.repr(value)
    return text if len(text) <= MOST_SHOWN + 2 else f"{text[:MOST_SHOWN]}..."


def reason(error: BaseException) -> str:
    """The first line of an exception's message, or the exception's class where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line and says why.

    The message may quote names from an untrusted file, so it is made ``printable``.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class FormatError(UserError):
    """A file is cut, damaged, hostile, or of another kind than it should be."""


class BudgetError(UserError):
    """The memory budget is too small; ``least`` is the smallest that works, in bytes."""

    def __init__(self, message: object, least: int) -> None:
        super().__init__(message)
        self.least = least
