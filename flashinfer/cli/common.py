"""What several commands share: types of arguments, progress bars, JSON output."""

import argparse
import json
import sys
from contextlib import contextmanager

from tqdm import tqdm

from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.number_formats import FORMATS
from flashinfer.memory import parse_size


def size(text):
    """An argparse type: "600M" -> bytes."""
    try:
        return parse_size(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text):
    """An argparse type: a number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def positive(text):
    """An argparse type: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def id_list(text):
    """An argparse type: "2,10,15" -> [2, 10, 15]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not token ids such as 2,10,15") from None


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


def write_json(path, figures):
    """Write figures as JSON to ``path``, if it is given. Raises UserError where that fails."""
    if path is None:
        return
    text = json.dumps(figures, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


@contextmanager
def opened_text(path):
    """The file of a text, open to be read. Raises UserError where it cannot be read, FormatError
    where it is not UTF-8."""
    try:
        with open(path, encoding="utf-8") as file:
            yield file
    except UnicodeDecodeError:
        raise FormatError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        if error.filename not in (None, path):
            raise
        raise UserError(f"{path}: {error.strerror}") from None


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
