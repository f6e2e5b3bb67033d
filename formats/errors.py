"""Mistakes that a user can mend. Each message is one line: what, where, and what would be right."""


def printable(value):
    """``value`` as text without control characters, which a file could send to the terminal.

    What cannot be printed becomes a "?".
    """
    return "".join(c if c.isprintable() else "?" for c in str(value))


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
