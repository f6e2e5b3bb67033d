"""The text that a command works on, as token ids."""

from argparse import ArgumentParser, Namespace
from io import StringIO

from flashinfer.cli.common import id_list, open_bundle
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.errors import UserError
from flashinfer.formats.files import opened_text
from flashinfer.text.tokenizer import Tokenizer, utf8


def add_text_arguments(parser: ArgumentParser) -> None:
    """The tokens to work on: what ``ids_of_text`` takes."""
    text = parser.add_mutually_exclusive_group()
    text.add_argument("-p", "--prompt", metavar="TEXT")
    text.add_argument("-f", "--file", metavar="FILE", help="a file that holds the text")
    text.add_argument("--tokens", type=id_list, metavar="IDS", help="token ids, such as 2,10,15")


def ids_of_text(args: Namespace) -> list[int]:
    """The token ids that the arguments of ``add_text_arguments`` name. Raises UserError."""
    if args.tokens:
        return args.tokens
    if args.prompt is None and args.file is None:
        raise UserError("give a text with -p or -f, or token ids with --tokens")
    with open_bundle(args.model, args.memory) as bundle:
        return prompt_ids(args, Tokenizer(bundle, args.memory), bundle.config)


def prompt_ids(args: Namespace, tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
    """The prompt's token ids.

    Of a prompt that is too long for the context only a part is read. Raises UserError where it is
    too long, or empty for a model without a token that begins a text.
    """
    asked = getattr(args, "ctx_size", None) or config.max_position_embeddings
    most = min(asked, config.max_position_embeddings)
    name = args.file or "--prompt"
    utf8(args.prompt or "", name)
    with opened_text(args.file) if args.file else StringIO(args.prompt or "") as file:
        ids, whole = tokenizer.encode_up_to(most, file.read)
    tokenizer.close()
    if not whole or len(ids) > most:
        raise UserError(f"{name}: the prompt has more tokens than the context of {most} holds")
    if not ids and config.bos_token_id is not None:
        ids = [config.bos_token_id]
    if not ids:
        raise UserError("give a prompt with -p: this model has no token that begins a text")
    return ids
