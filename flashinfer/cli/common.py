"""What several commands share: types of arguments, progress bars, JSON output."""

import argparse
import json
import math
import os
import re
import sys
from contextlib import contextmanager

from tqdm import tqdm

from flashinfer.formats.errors import UserError
from flashinfer.formats.files import opened_text, refuse_loss, refuse_target, replacing
from flashinfer.formats.number_formats import FORMATS
from flashinfer.plan.memory import parse_size

MOST_WHOLE = (1 << 31) - 1  # of tokens, sizes, threads; more than any of them can be
MOST_SEED = (1 << 64) - 1
INPUTS = ("model", "source", "text", "file", "device", "predictor_from")
OUTPUTS = ("destination", "output", "profile", "json")
JSON_SCHEMA = 1  # of every object that write_json writes; docs/json.md says when it grows


def size(text):
    """An argparse type: "600M" -> bytes."""
    try:
        return parse_size(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text):
    """An argparse type: a number above 0 and at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{_quoted(text)} is not above 0 and at most 1")
    return value


def temperature(text):
    """An argparse type: a number from 0 on."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{_quoted(text)} is not a number from 0 on")
    return value


def _number(text):
    """The float that ASCII digits say; NaN where they say none."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan


def whole(least, most=MOST_WHOLE):
    """An argparse type: a whole number from ``least`` on, written in ASCII digits."""

    def parse(text):
        value = -1
        if re.fullmatch("[0-9]+", text):
            value = int(text) if len(text) <= 20 else most + 1
        if not least <= value <= most:
            bound = f"from {least} on" if value < least else f"of at most {most}"
            raise argparse.ArgumentTypeError(f"{_quoted(text)} is not a whole number {bound}")
        return value

    return parse


positive, natural, seed = whole(1), whole(0), whole(0, MOST_SEED)


def id_list(text):
    """An argparse type: "2,10,15" -> [2, 10, 15]."""
    try:
        return [natural(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{_quoted(text)} is not token ids such as 2,10,15"
        ) from None


def _quoted(text):
    """What was given, short enough for a line."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def add_dtypes(parser, default="f16", meaning="f16"):
    """The number formats of a bundle to be written."""
    parser.add_argument(
        "--dtype", choices=FORMATS, default=default, help=f"of the weights; default: {meaning}"
    )
    parser.add_argument(
        "--dense-dtype", choices=FORMATS, help="of what is not feed-forward; default: as --dtype"
    )


def add_json(parser):
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures there as one JSON object; - for stdout"
    )


def check_outputs(args):
    """Raise UserError where what a command shall write cannot be written, or would replace what
    it reads, or something else that it writes. Asked before any work is done."""
    inputs = [getattr(args, name, None) for name in INPUTS]
    targets = [getattr(args, name, None) for name in OUTPUTS]
    targets = [target for target in targets if target not in (None, "-")]
    for number, target in enumerate(targets):
        if target != getattr(args, "profile", None):  # whose directory is made
            refuse_target(target)
        # A bundle may be calibrated in place.
        own = [args.model] if target == getattr(args, "output", None) else []
        read = [path for path in inputs if path is not None and path not in own]
        refuse_loss(target, read)
        if any(os.path.realpath(target) == os.path.realpath(other) for other in targets[:number]):
            raise UserError(f"{target}: is named twice as a file to write")


def write_json(path, figures):
    """Write a dict of figures as one JSON object to ``path``, if it is given: the whole file, or
    none. Raises UserError where that fails.

    The object begins with ``"schema": JSON_SCHEMA``, so that whoever reads it can tell which keys
    to expect. JSON has no infinities: they become null.
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


def _finite(value):
    """``value`` of dicts, lists and plain values, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_ids(path, tokenizer, tokens):
    """The first ``tokens`` token ids of a text file, of which no more than that needs is read."""
    with opened_text(path) as file:
        ids, _ = tokenizer.encode_up_to(tokens, file.read)
    tokenizer.close()
    return ids[:tokens]


@contextmanager
def model_bars():
    """Progress bars for opening a model and for a long prompt; yields Model.open's progress."""
    bars = {}
    formats = {
        "load": {"unit": "B", "unit_scale": True, "unit_divisor": 1024},
        "prompt": {"bar_format": "{l_bar}{bar}| [{elapsed}<{remaining}]"},
    }

    def progress(what, done, total):
        if what not in bars:
            bars[what] = tqdm(desc=what, total=total, leave=False, delay=1, **formats[what])
        bars[what].update(done - bars[what].n)
        if done >= total:
            bars.pop(what).close()

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()


@contextmanager
def byte_bar(description):
    """A progress bar in bytes; yields progress(bytes_more, bytes_in_all)."""
    with tqdm(
        desc=description,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        leave=False,
        delay=0.5,
        mininterval=0.5,
    ) as bar:

        def progress(more, total):
            bar.total = total
            bar.update(more)

        yield progress
