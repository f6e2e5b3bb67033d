"""``--session``: a text that a command goes on with, and leaves behind for the next."""

import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any, TextIO

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError
from flashinfer.generation.session import Message, Session, peek
from flashinfer.model import Model


def add_session_argument(parser: ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--session", metavar="FILE", help=f"{what}, with its keys and values, is kept there: what "
        "of it stands in the file already is read instead of computed",
    )  # fmt: skip


class Kept:
    """The session that ``--session`` names, before and after the model is open.

    path    the file, or None without ``--session``
    stored  the Session that stood there, or None
    Raises FormatError where something else stands there, or a session of another model.
    """

    def __init__(self, path: str | None, bundle: Bundle) -> None:
        self.path = path
        self.stored: Session | None = None
        if path is not None and os.path.exists(path):
            self.stored = peek(path, bundle)
        self.read_seconds = self.write_seconds = 0.0
        self.saved = 0

    @property
    def token_ids(self) -> list[int]:
        """The text that stood there, or none."""
        return self.stored.token_ids if self.stored else []

    @property
    def messages(self) -> list[Message]:
        """The conversation that stood there, or none."""
        return self.stored.messages if self.stored else []

    def leave(self) -> None:
        """Leave the file as it is from now on."""
        self.path = None

    def load(self, model: Model) -> None:
        """Read what stood there into the model's key/value cache. Raises UserError."""
        if self.path is not None and self.stored is not None:
            begun = time.perf_counter()
            self.stored = model.load_session(self.path)
            self.read_seconds = time.perf_counter() - begun

    def save(
        self,
        model: Model,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
    ) -> None:
        """Write the text that the model holds, or ``token_ids``. Raises UserError.

        messages  None: those that stood there
        """
        if self.path is not None:
            begun = time.perf_counter()
            model.save_session(
                self.path, token_ids, self.messages if messages is None else messages
            )
            self.write_seconds = time.perf_counter() - begun
            self.saved = model.position if token_ids is None else len(token_ids)

    def try_to_save(self, model: Model, messages: Sequence[Message]) -> None:
        """As ``save``, where work goes on: what fails is said, and what stood there stays."""
        try:
            self.save(model, None, messages)
        except UserError as error:
            print(f"flashinfer: {error}", file=sys.stderr)

    def as_dict(self, resumed: int) -> dict[str, Any] | None:
        """The figures for --json; resumed: tokens of the prompt that were not computed again."""
        if self.path is None:
            return None
        return {
            "stored_tokens": self.stored.kept if self.stored else 0,
            "resumed_tokens": resumed,
            "saved_tokens": self.saved,
            "read_seconds": self.read_seconds,
            "write_seconds": self.write_seconds,
        }

    def print_account(self, resumed: int, prompt: int, out: TextIO) -> None:
        """The same for people; prompt: tokens of it."""
        if self.path is not None:
            print(
                f"session     {resumed} of {prompt} tokens of the prompt were read back in "
                f"{self.read_seconds:.2f} s, {self.saved} saved in {self.write_seconds:.2f} s",
                file=out,
            )
