"""The lines that ``flashinfer batch`` reads and writes: one JSON object for each text."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flashinfer.cli.common import MOST_SEED, MOST_WHOLE
from flashinfer.formats import bounded_json
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.files import open_regular
from flashinfer.formats.numbers import is_number, is_whole
from flashinfer.formats.progress import Progress, no_progress

MOST_LINE = 16 << 20  # bytes
MOST_JSON = 256 << 20  # of DRAM, that a line's JSON may take


class Settings(NamedTuple):
    """How a text is written, where its line does not say; see Sampler."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None


@dataclass(frozen=True)
class Line:
    """A text to be written.

    number  of the line, from 1 on; prompt: a text, or token ids; id: what the line calls itself
    """

    number: int
    prompt: str | list[int]
    settings: Settings
    id: Any = None

    def key(self, model: list[Any]) -> str:
        """A hash of all that decides what is written: the prompt, the settings, and what ``model``
        names."""
        named = [self.prompt, list(self.settings), *model]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


class WrongLine(NamedTuple):
    """A line that cannot be read, and why."""

    number: int
    why: str


def lines_of(
    path: str, default: Settings, progress: Progress = no_progress
) -> Iterator[Line | WrongLine]:
    """Yield the lines of a file, empty ones left out. Raises UserError where it cannot be read.

    progress  is told the bytes of the lines that were yielded, as "read"
    """
    with open_regular(path) as file:
        size, done = os.fstat(file.fileno()).st_size, 0
        for number, raw in _raw_lines(file, path):
            done += len(raw or b"") + 1
            progress("read", min(done, size), size)
            if raw is None:
                yield WrongLine(number, f"has more than {MOST_LINE} bytes")
            elif raw.strip():
                try:
                    yield _line(number, raw, default)
                except (FormatError, ValueError) as error:
                    yield WrongLine(number, str(error))


def _raw_lines(file: Any, path: str) -> Iterator[tuple[int, bytes | None]]:
    """(number, bytes) of each line; None where it is too long."""
    number, rest, skipping = 0, b"", False
    while True:
        try:
            piece = file.read(1 << 20)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            number += 1
            yield number, None if skipping or len(line) > MOST_LINE else line
            skipping = False
        if len(rest) > MOST_LINE:
            rest, skipping = b"", True
        if not piece:
            if rest or skipping:
                yield number + 1, None if skipping else rest
            return


def _line(number: int, raw: bytes, default: Settings) -> Line:
    """The Line that JSON describes. Raises FormatError or ValueError, which say what is wrong."""
    value = bounded_json.parse(raw, "is not a JSON object", MOST_JSON, unique=True, finite=True)
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    unknown = sorted(value.keys() - {"id", "prompt", "tokens", *Settings._fields})
    if unknown:
        known = ", ".join(("prompt", "tokens", "id", *Settings._fields))
        raise ValueError(f"has an unknown key {unknown[0][:40]!r}; known are {known}")
    if ("prompt" in value) == ("tokens" in value):
        raise ValueError('needs one of "prompt" and "tokens"')
    prompt: Any = value.get("prompt", value.get("tokens"))
    if "tokens" in value:
        if not isinstance(prompt, list) or not all(is_whole(id, 0, MOST_WHOLE) for id in prompt):
            raise ValueError('"tokens" is not a list of token ids')
    elif not isinstance(prompt, str):
        raise ValueError('"prompt" is not a text')
    return Line(number, prompt, _settings(value, default), value.get("id"))


def _settings(value: JsonObject, default: Settings) -> Settings:
    """The Settings of a line's JSON object. Raises ValueError."""
    settings = default._replace(**{k: v for k, v in value.items() if k in Settings._fields})
    checks = {
        "max_tokens": is_whole(settings.max_tokens, 1, MOST_WHOLE),
        "temperature": is_number(settings.temperature, 0.0, 1e30),
        "top_k": is_whole(settings.top_k, 0, MOST_WHOLE),
        "top_p": is_number(settings.top_p, 0.0, 1.0) and settings.top_p > 0,
        "seed": settings.seed is None or is_whole(settings.seed, 0, MOST_SEED),
    }
    for name, sound in checks.items():
        if not sound:
            raise ValueError(f"{name} {str(getattr(settings, name))[:40]!r} is out of range")
    return settings


class Written:
    """The file of texts that are written: one JSON object a line, in the order in which they were
    done. What a run that was stopped left there counts, but for a line that was cut.

    done  {number of a line of the prompts: its key}
    """

    def __init__(self, path: str) -> None:
        self.path, self.done = path, dict[int, str]()
        try:
            self.file = open(path, "a+b", buffering=0)  # noqa: SIM115 - see close
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        try:
            self._read()
        except BaseException:
            self.file.close()
            raise

    def _read(self) -> None:
        """Read what is there; a last line without an end is cut off."""
        self.file.seek(0)
        whole = 0
        for number, raw in _raw_lines(self.file, self.path):
            end = whole + (0 if raw is None else len(raw)) + 1
            if raw is None or end > os.fstat(self.file.fileno()).st_size:
                break
            try:
                value = bounded_json.parse(raw, "", MOST_JSON)
                self.done[int(value["line"])] = str(value["key"])
            except (FormatError, KeyError, TypeError, ValueError):
                raise UserError(
                    f"{self.path}: line {number} was not written by flashinfer batch; name another "
                    "file"
                ) from None
            whole = end
        self.file.truncate(whole)

    def check(self, line: Line, key: str) -> bool:
        """Whether a line's text is there already. Raises UserError where the text there is of
        another prompt, model or settings."""
        if self.done.get(line.number, key) != key:
            raise UserError(
                f"{self.path}: line {line.number} of the prompts was written with another prompt, "
                "model or settings; name another file"
            )
        return line.number in self.done

    def write(self, entry: JsonObject, prompt: Sequence[int]) -> None:
        """Add a line, whole or not at all. Raises UserError."""
        end = self.file.seek(0, os.SEEK_END)
        text = json.dumps(entry, ensure_ascii=False) + "\n"
        left = memoryview(text.encode("utf-8", "backslashreplace"))  # an "id" may be no Unicode
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            self.file.truncate(end)
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Close the file."""
        self.file.close()
