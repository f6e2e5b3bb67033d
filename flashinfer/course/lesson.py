"""An exercise of the course: one function of the engine to write anew, and what it must reach."""

import builtins
import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flashinfer.formats.arrays import AnyArray
from flashinfer.formats.errors import UserError

MOST_SHOWN = 12  # items of an array that a message shows


class Wrong(UserError):
    """An answer is wrong; the message says where, and what would be right."""


@dataclass(frozen=True)
class Grade:
    """What a run with an answer is judged by.

    what    that was measured, with its unit; own: what the engine's own function reaches
    figure  measured with the answer; most: what passes, or None: the figure must be ``own``
    """

    what: str
    figure: float | str
    own: float | str
    most: float | None = None

    @property
    def passed(self) -> bool:
        """Whether it is good enough."""
        if self.most is None:
            return self.figure == self.own
        return not isinstance(self.figure, str) and self.figure <= self.most


class Lesson(Protocol):
    """A chapter's exercise, a module of ``chapters``."""

    TITLE: str
    ENGINE: str  # the file, and the function in it, that the engine has for this

    @property
    def solution(self) -> Callable[..., Any]:
        """The engine's own function, whose name, arguments and docstring state the task."""

    def examples(self, answer: "Answer") -> None:
        """Tries an answer on small inputs. Raises Wrong."""

    def grades(self, answer: "Answer", progress: Callable[[float], None]) -> list[Grade]:
        """Runs the engine with an answer in place of its own function. Raises Wrong."""


class Answer:
    """The function that somebody wrote, in ``file``; what it raises becomes a Wrong."""

    def __init__(self, function: Callable[..., Any], file: Path) -> None:
        self.function, self.file, self.name = function, file, function.__name__
        self.calls = 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        shown_before = [shown(a) for a in arguments] if self.calls == 1 else None
        try:
            return self.function(*arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            what = shown_before or [shown(a) for a in arguments]
            raise Wrong(
                f"{self.where(error)}: {type(error).__name__}: {str(error) or 'raised'}, "
                f"when called as {self.name}({', '.join(what)})"
            ) from None

    def where(self, error: BaseException) -> str:
        """The file and the line of it that an error came from."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(self.file)]
        return f"{self.file}, line {lines[-1]}" if lines else str(self.file)

    def wrong(self, message: str) -> Wrong:
        """A Wrong that names the file and the function."""
        return Wrong(f"{self.file}: {self.name}: {message}")

    def array(self, given: Any, dtype: type, what: str, shape: tuple[int, ...] = ()) -> AnyArray:
        """What the answer gave as an array of ``dtype``; ``shape`` (): of one axis, any length.
        Raises Wrong where it is none: whole numbers must be whole, and all must be finite."""
        try:
            array = np.asarray(given)
        except Exception:
            raise self.wrong(f"{what} is {shown(given)}, which is no array") from None
        kinds = "iu" if np.issubdtype(dtype, np.integer) else "iuf"
        if dtype is np.bool_:
            kinds = "b"
        if array.dtype.kind not in kinds and array.size:
            wanted = {"iu": "whole numbers", "iuf": "numbers", "b": "True and False"}[kinds]
            raise self.wrong(f"{what} must be an array of {wanted}, not {shown(given)}")
        if shape and array.shape != shape:
            raise self.wrong(f"{what} must have the shape {shape}, not {array.shape}")
        if not shape and array.ndim != 1:
            raise self.wrong(f"{what} must have one axis, not the shape {array.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise self.wrong(f"{what} has values that are no finite numbers: {shown(given)}")
        return np.ascontiguousarray(array, dtype=dtype)


def loaded(file: Path, name: str) -> Answer:
    """The function ``name`` that a file of Python defines. Raises Wrong, or UserError where the
    file cannot be read."""
    try:
        source = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; --begin writes one to fill in") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    names: dict[str, Any] = {"__name__": file.stem, "__file__": str(file)}
    try:
        exec(compile(source, str(file), "exec"), names)
    except KeyboardInterrupt:
        raise
    except SyntaxError as error:
        raise Wrong(f"{file}, line {error.lineno}: {error.msg}") from None
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        raise Wrong(
            f"{file}, line {lines[-1] if lines else 1}: {type(error).__name__}: {error}"
        ) from None
    function = names.get(name)
    if not inspect.isfunction(function):
        raise Wrong(f"{file}: defines no function called {name}")
    return Answer(function, file)


def task(lesson: Lesson) -> str:
    """The function to fill in, as Python: its name, arguments and docstring."""
    function = lesson.solution
    arguments = ", ".join(inspect.signature(function).parameters)
    lines = (inspect.getdoc(function) or "").splitlines()
    doc = "\n".join(f"    {line}".rstrip() for line in lines)
    return (
        "import numpy as np\n\n\n"
        f'def {function.__name__}({arguments}):\n    """{doc.lstrip()}\n    """\n'
        "    raise NotImplementedError\n"
    )


@contextmanager
def in_place_of(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The engine uses ``function`` instead of ``owner``'s, while the block runs."""
    own = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, own)


def shown(value: Any) -> str:
    """A value in a message, short."""
    if isinstance(value, np.ndarray):
        if value.size <= MOST_SHOWN:
            return np.array2string(value, separator=", ", max_line_width=10_000).replace("\n", "")
        return f"<array {value.shape} {value.dtype}>"
    if type(value).__module__ != builtins.__name__:
        return f"<{type(value).__name__}>"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
