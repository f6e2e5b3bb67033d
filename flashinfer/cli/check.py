"""Grade an answer to a chapter of the course: your function, in the engine, in place of its own.

Chapters (docs/course): 1 bundle, 2 place, 3 predictor, 4 merge, 5 worth, 6 guess, 7 divide,
8 accept. FILE is Python and defines the function of that name; --begin writes a file to fill in.
The answer must leave every bit of the logits as it is, and reach what the chapter asks for.
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from flashinfer.cli.common import NotConforming, add_json, progress_bars, whole, write_json
from flashinfer.course.chapters import LESSONS
from flashinfer.course.lesson import Grade, Lesson, Wrong, loaded, task
from flashinfer.formats.errors import UserError
from flashinfer.formats.files import refuse_target, replacing


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("chapter", type=whole(1, len(LESSONS)), metavar="N",
                        help=f"the chapter, 1 to {len(LESSONS)}")  # fmt: skip
    parser.add_argument("answer", type=Path, nargs="?", metavar="FILE",
                        help="Python that defines the function; none: print the task")  # fmt: skip
    parser.add_argument("--begin", action="store_true",
                        help="write FILE, with the function to fill in")  # fmt: skip
    add_json(parser)


def main(args: Namespace) -> None:
    lesson = LESSONS[args.chapter - 1]
    if args.answer is None or args.begin:
        _begin(args, lesson)
        return
    wrong, found = None, []
    try:
        answer = loaded(args.answer, lesson.solution.__name__)
        with progress_bars() as progress:
            lesson.examples(answer)
            found = lesson.grades(answer, lambda share: progress("check", share, 1.0))
    except Wrong as error:
        wrong = str(error)
    passed = wrong is None and all(grade.passed for grade in found)
    if args.json != "-":
        print("\n".join(_lines(args.chapter, lesson, found, wrong)), flush=True)
    write_json(
        args.json,
        {
            "chapter": args.chapter,
            "function": lesson.solution.__name__,
            "file": str(args.answer),
            "passed": passed,
            "wrong": wrong,
            "grades": [
                {"what": g.what, "figure": g.figure, "own": g.own, "most": g.most,
                 "passed": g.passed}
                for g in found
            ],
        },
    )  # fmt: skip
    if not passed:
        raise NotConforming


def _begin(args: Namespace, lesson: Lesson) -> None:
    """Print the task, or write the file to fill in."""
    if args.answer is None:
        if args.begin:
            raise UserError("--begin: name the FILE to write")
        sys.stdout.write(task(lesson))
        return
    if args.answer.exists():
        raise UserError(f"{args.answer}: exists; --begin writes a new file only")
    refuse_target(args.answer)
    with replacing(args.answer) as file:
        file.write(task(lesson).encode())
    print(f"{args.answer}: fill in {lesson.solution.__name__}, then: "
          f"flashinfer check {args.chapter} {args.answer}")  # fmt: skip


def _lines(chapter: int, lesson: Lesson, found: list[Grade], wrong: str | None) -> list[str]:
    """What is told of an answer."""
    if wrong is not None:
        return [f"chapter {chapter}, {lesson.TITLE}: not yet", "", wrong]
    width = max(len(grade.what) for grade in found)
    lines = [f"chapter {chapter}, {lesson.TITLE}: "
             + ("passed" if all(g.passed for g in found) else "not yet"), ""]  # fmt: skip
    for grade in found:
        most = "" if grade.most is None else f", at most {_shown(grade.most)}"
        lines.append(
            f"{'ok ' if grade.passed else 'NO '} {grade.what.ljust(width)}  "
            f"{_shown(grade.figure)}   (the engine's own: {_shown(grade.own)}{most})"
        )
    if all(grade.passed for grade in found):
        lines += ["", f"The engine's own function: {lesson.ENGINE}"]
    return lines


def _shown(figure: float | str) -> str:
    return figure if isinstance(figure, str) else f"{figure:,.1f}"
