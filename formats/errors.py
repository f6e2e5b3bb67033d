"""Mistakes that a user can mend. Each message is one line: what, where, and what would be right."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line and says why.

    Names that a file gives may hold anything: what cannot be printed becomes a "?".
    """

    def __init__(self, message=""):
        super().__init__("".join(c if c.isprintable() else "?" for c in str(message)))


class FormatError(UserError):
    """A file is not what it should be: cut, damaged, hostile, or of another kind."""


class BudgetError(UserError):
    """The memory budget is too small; ``least`` is the smallest that works, in bytes."""

    def __init__(self, message, least):
        super().__init__(message)
        self.least = least
