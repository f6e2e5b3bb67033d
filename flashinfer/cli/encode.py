"""Print the vectors of texts by an encoder, such as BERT: a line a text.

The texts are those of -p, the lines of a file that are not empty, or token ids. A vector is the
model's pooled one, the first token's, or the mean of the tokens' (--pooling); or each token has a
line of its own.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from flashinfer.cli.common import add_json, id_list, positive, progress_bars, write_json
from flashinfer.cli.model_options import add_model_arguments, options_of
from flashinfer.formats.arrays import Float32Array
from flashinfer.formats.errors import UserError
from flashinfer.formats.files import opened_text
from flashinfer.model import Model
from flashinfer.opened import Encoding
from flashinfer.plan.memory import peak_rss

POOLINGS = ("pooled", "first", "mean", "none")
LONGEST_LINE = 1 << 20  # characters, more than any context holds


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("-p", "--prompt", nargs="+", metavar="TEXT", help="texts")
    texts.add_argument("--text", metavar="FILE", help="a file, one text a line")
    texts.add_argument(
        "--tokens", type=id_list, nargs="+", metavar="IDS", help="token ids, such as 2,10,15"
    )
    parser.add_argument(
        "--pooling", choices=POOLINGS, help="the vector of a text: the model's pooled one, that of "
        "the first token, or the mean of the tokens'; none: all of them; default: pooled where the "
        "model has a pooler, else mean",
    )  # fmt: skip
    parser.add_argument(
        "-c", "--ctx-size", type=positive, metavar="N",
        help="tokens of the longest text, for which the budget needs room; default: the model's "
        "most",
    )  # fmt: skip
    add_model_arguments(parser)
    add_json(parser)


def main(args: Namespace) -> None:
    with (
        progress_bars() as progress,
        Model.open(args.model, options_of(args, context=args.ctx_size), progress) as model,
    ):
        usual = "pooled" if model.config.pooler else "mean"
        pooling, found = args.pooling or usual, []
        if pooling == "pooled" and not model.config.pooler:
            raise UserError(f"{args.model}: has no pooler; --pooling first, mean or none")
        for text in texts_of(args):
            encoding = model.encode([text])[0]
            vectors = vectors_of(encoding, pooling)
            if args.json is not None:
                numbers = [listed(vector) for vector in vectors]
                found.append({"tokens": encoding.token_ids, "vectors": numbers})
            if args.json != "-":
                for vector in vectors:
                    print(*(f"{value:.9g}" for value in vector))
        figures: dict[str, Any] = {
            "model": args.model,
            "pooling": pooling,
            "hidden_size": model.config.hidden_size,
            "texts": found,
            "peak_rss_bytes": peak_rss(),
            "memory_budget_bytes": model.plan.budget,
            "context": model.plan.context,
        }
    write_json(args.json, figures)


def texts_of(args: Namespace) -> Iterator[str | ArrayLike]:
    """Yield the texts that the arguments name, as strings or as token ids. Raises UserError."""
    if args.text is None:
        yield from args.prompt or args.tokens
        return
    with opened_text(args.text) as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                raise UserError(f"{args.text}: line {number} is too long for a text")
            if line.strip():
                yield line.rstrip("\r\n")


def vectors_of(encoding: Encoding, pooling: str) -> Sequence[Float32Array]:
    """The vectors of a text, (d_model,) float32 each."""
    hidden = encoding.hidden
    if pooling == "none":
        return list(hidden)
    if pooling == "pooled" and encoding.pooled is not None:
        return [encoding.pooled]
    return [hidden[0] if pooling == "first" else hidden.mean(axis=0, dtype=np.float32)]


def listed(vector: Float32Array) -> list[float]:
    """The numbers of a vector with as many digits as float32 has."""
    return [float(f"{value:.9g}") for value in vector]
