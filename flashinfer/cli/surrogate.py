"""Make a store of drafts from what a model itself writes, which speeds up text of that kind.

PROMPTS is a file of JSON lines as flashinfer batch takes them. The model writes them together; its
texts become the store, and flashinfer run --draft STORE drafts from them. The text that is written
with drafts is the same as without.
"""

import sys
from argparse import ArgumentParser, Namespace
from array import array
from collections.abc import Sequence
from typing import Any

from flashinfer.cli.batch import Work, add_batch_arguments, open_for, print_account
from flashinfer.cli.batch_lines import Line
from flashinfer.cli.common import add_json, open_bundle, progress_bars, write_json
from flashinfer.formats.bundle.layout import TOKENIZER
from flashinfer.formats.errors import UserError
from flashinfer.generation.store import write_store
from flashinfer.generation.suffixes import agreement
from flashinfer.text.tokenizer import Tokenizer

HELD_OUT = 10  # one text of so many is left out while the store's own guesses are counted


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="one JSON object a line")
    parser.add_argument("-o", "--output", required=True, metavar="STORE")
    add_batch_arguments(parser)
    add_json(parser)


class Texts:
    """Keeps the texts that are written: each a list of token ids, with its prompt."""

    def __init__(self) -> None:
        self.ids: list[Sequence[int]] = []

    def check(self, line: Line, key: str) -> bool:
        """No text is there already."""
        return False

    def write(self, entry: dict[str, Any], prompt: Sequence[int]) -> None:
        """A text is done."""
        self.ids.append(array("I", [*prompt, *entry["token_ids"]]))


def main(args: Namespace) -> None:
    with open_bundle(args.model, args.memory) as bundle:
        bundle.config.refuse_encoder(args.model)
        tokenizer = None if bundle.where(TOKENIZER) is None else Tokenizer(bundle, args.memory)
        config, digest, vocabulary = bundle.config, bundle.digest, bundle.vocabulary
    texts = Texts()
    with progress_bars() as progress:
        work = Work(args, config, digest, tokenizer, texts)
        count, context = work.survey(progress)
        if work.wrong:
            raise UserError(f"{args.prompts}: {work.wrong} lines are wrong")
        if not count:
            raise UserError(f"{args.prompts}: has no prompts")
        with open_for(args, work, count, context, progress) as model:
            work.write(model, count, progress)
            print_account(model, work)
        named, tokens = agreement(texts.ids, config.vocab_size, HELD_OUT)
        written = write_store(args.output, texts.ids, vocabulary, progress)
    print(f"{args.output}: {written} tokens of {count} texts", file=sys.stderr)
    if tokens:
        print(
            f"of {tokens} tokens of texts that were left out, the others name {100 * named:.1f} %",
            file=sys.stderr,
        )
    figures = {"texts": count, "tokens": written, "held_out_tokens": tokens, "named": named}
    write_json(args.json, figures)
