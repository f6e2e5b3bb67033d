"""What several commands share: types of arguments, progress bars, JSON output."""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError
from flashinfer.formats.files import opened_text, refuse_loss, refuse_target, replacing
from flashinfer.formats.number_formats import FORMATS
from flashinfer.formats.progress import Progress
from flashinfer.plan.memory import header_room, parse_size
from flashinfer.text.tokenizer import Tokenizer

MOST_WHOLE = (1 << 31) - 1  # more than any count of tokens, bytes a row, or threads can be
MOST_SEED = (1 << 64) - 1
MOST_POSITIONS = 1 << 20  # of a text that are named together
# Arguments that name a file to read, and arguments that name a file to write.
INPUTS = (
    "model", "source", "text", "choices", "against", "file", "device", "predictor_from", "trace",
    "file_map", "arithmetic", "prompts", "draft", "answer",
)  # fmt: skip
OUTPUTS = (
    "destination", "output", "profile", "json", "html", "junit", "session", "record",
)  # fmt: skip
JSON_SCHEMA = 1  # of every object that write_json writes; docs/json.md says when it grows
DELAY = 0.5  # seconds; shorter work shows no bar
BYTES = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
LAYERS = {"bar_format": "{l_bar}{bar}| {n:.1f}/{total} layers [{elapsed}<{remaining}]"}
# {the work that a Progress names: how tqdm shows it}
BARS: dict[str, dict[str, Any]] = {
    "load": BYTES,
    "write": BYTES,
    "verify": BYTES,
    "prompt": {"bar_format": "{l_bar}{bar}| [{elapsed}<{remaining}]"},
    "calibrate": LAYERS,
    "evaluate": {"unit": "token"},
    "dense": {"unit": "token"},
    "predicted": {"unit": "token"},
    "routed": {"unit": "token"},
    "ideal": {"unit": "token"},
    "tokenize": {"unit": "question"},
    "choices": {"unit": "question"},
    "batch": {"unit": "text"},
    "read": BYTES,
    "trace": {"unit": "token"},
    "compare": {"unit": "operation"},
    "kit": {"unit": "model"},
    "record": {"unit": "token"},
    "replay": {"bar_format": "{l_bar}{bar}| [{elapsed}<{remaining}]"},
    "check": {"bar_format": "{l_bar}{bar}| [{elapsed}<{remaining}]"},
    "plan": {"unit": "plan"},
    "probe": {"bar_format": "{l_bar}{bar}| [{elapsed}<{remaining}]"},
    "sparsity": LAYERS,
    "windows": LAYERS,
    "batches": LAYERS,
    "coactivation": LAYERS,
    "predictors": LAYERS,
    "failed": LAYERS,
    "tables": {"bar_format": "{l_bar}{bar}| {n:.0f}/{total:.0f} models [{elapsed}<{remaining}]"},
    "blocks": {"bar_format": "{l_bar}{bar}| [{elapsed}<{remaining}]"},
}


class NotConforming(Exception):
    """A command that judges has found against what it judged: the exit code is 1, and all is
    said."""


def size(text: str) -> int:
    """An argparse type: "600M" -> bytes."""
    try:
        return parse_size(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{_quoted(text)} is not above 0 and at most 1")
    return value


def temperature(text: str) -> float:
    """An argparse type: a number from 0 on."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{_quoted(text)} is not a number from 0 on")
    return value


def _number(text: str) -> float:
    """The float written in ASCII digits; NaN where ``text`` is something else."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan


def whole(least: int, most: int = MOST_WHOLE) -> Callable[[str], int]:
    """An argparse type: a whole number from ``least`` to ``most``, written in ASCII digits."""

    def parse(text: str) -> int:
        value = -1
        if re.fullmatch("[0-9]+", text):
            value = int(text) if len(text) <= 20 else most + 1
        if not least <= value <= most:
            bound = f"from {least} on" if value < least else f"of at most {most}"
            raise argparse.ArgumentTypeError(f"{_quoted(text)} is not a whole number {bound}")
        return value

    return parse


positive, natural, seed = whole(1), whole(0), whole(0, MOST_SEED)


def id_list(text: str) -> list[int]:
    """An argparse type: "2,10,15" -> [2, 10, 15]."""
    try:
        return [natural(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{_quoted(text)} is not token ids such as 2,10,15"
        ) from None


def positions(text: str) -> list[int]:
    """An argparse type: "0,5,10-12" -> [0, 5, 10, 11, 12]."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            begin = natural(first.strip())
            end = natural(last.strip()) if dash else begin
        except argparse.ArgumentTypeError:
            end, begin = -1, 0
        if not begin <= end < begin + MOST_POSITIONS:
            raise argparse.ArgumentTypeError(f"{_quoted(text)} is not positions such as 0,5,10-20")
        found += range(begin, end + 1)
    return found


def _quoted(text: str) -> str:
    """An argument as an error message shows it, short enough for a line."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def add_dtypes(
    parser: argparse.ArgumentParser, default: str | None = "f16", meaning: str = "f16"
) -> None:
    """The number formats of a bundle to be written; meaning: of the default, for people."""
    parser.add_argument(
        "--dtype",
        choices=FORMATS,
        default=default,
        help=f"of the weights; tq1_0 and tq2_0 are for ternary ones; default: {meaning}",
    )
    parser.add_argument(
        "--dense-dtype", choices=FORMATS, help="of what is not feed-forward; default: as --dtype"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures there as one JSON object; - for stdout"
    )


def check_outputs(args: argparse.Namespace) -> None:
    """Raise UserError where an output cannot be written, is an input, too, or is named twice.

    It is called before any work is done. Functions that write a bundle check it as well, for those
    who call them from Python.
    """
    named = [getattr(args, name, None) for name in INPUTS]
    lists = [value if isinstance(value, list) else [value] for value in named]
    inputs = [path for paths in lists for path in paths]
    outputs = [getattr(args, name, None) for name in OUTPUTS]
    targets = [target for target in outputs if target not in (None, "-")]
    for number, target in enumerate(targets):
        if target != getattr(args, "profile", None):  # whose directory is made when it is written
            refuse_target(target)
        # A bundle may be calibrated in place.
        own = [args.model] if args.command == "calibrate" and target == args.output else []
        refuse_loss(target, [path for path in inputs if path is not None and path not in own])
        if any(os.path.realpath(target) == os.path.realpath(other) for other in targets[:number]):
            raise UserError(f"{target}: is named twice as a file to write")


def write_json(path: str | None, figures: dict[str, Any]) -> None:
    """Write figures as one JSON object to the file ``path``, to stdout for "-", or nowhere for
    None.

    The object begins with ``"schema": JSON_SCHEMA``, so that whoever reads it can tell which keys
    to expect. The file appears whole or not at all. JSON has no infinities: they become null.
    Raises UserError where the file cannot be written.
    """
    if path is None:
        return
    figures = {"schema": JSON_SCHEMA, **_finite(figures)}
    text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    with replacing(path) as file:
        file.write(text.encode())


def _finite(value: Any) -> Any:
    """``value`` of dicts, lists and plain values, with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_bundle(path: Path | str, budget: int | None, calibrated: bool = True) -> Bundle:
    """The Bundle at ``path``, whose header may take what a memory budget in bytes has room for.

    budget  None: what the machine has free
    """
    return Bundle(path, calibrated, header_room(budget))


def text_ids(path: Path | str, tokenizer: Tokenizer, tokens: int) -> list[int]:
    """The first ``tokens`` token ids of a text file, which is not read further than needed."""
    with opened_text(path) as file:
        ids, _ = tokenizer.encode_up_to(tokens, file.read)
    tokenizer.close()
    return ids[:tokens]


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A Progress that shows each work as a bar on stderr."""
    bars: dict[str, tqdm[Any]] = {}

    def progress(what: str, done: float, total: float) -> None:
        if what not in bars:
            bars[what] = tqdm(
                desc=what, total=total, leave=False, delay=DELAY, mininterval=0.5, **BARS[what]
            )
        bars[what].update(done - bars[what].n)
        if done >= total:
            bars.pop(what).close()

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()
