"""Talk with a model, by its own chat template.

/system TEXT sets what the model is told first, /reset forgets the conversation, /exit ends it;
Ctrl-C stops a reply, Ctrl-D ends the program.
"""

import io
import sys
from argparse import ArgumentParser, Namespace

from flashinfer.cli.common import open_bundle, positive, progress_bars
from flashinfer.cli.model_options import (
    add_draft_argument,
    add_model_arguments,
    add_sampling_arguments,
    open_model,
)
from flashinfer.cli.session import Kept, add_session_argument
from flashinfer.formats.errors import UserError
from flashinfer.model import Model
from flashinfer.text.chat import Conversation, chat_tokenizer
from flashinfer.text.tokenizer import utf8

HELP = "/system TEXT, /reset, /exit; Ctrl-C stops a reply"
CONTEXT = 2048  # tokens, where the model allows as many


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("-n", "--predict", type=positive, default=512, metavar="N",
                        help="tokens of a reply, at most (512)")  # fmt: skip
    parser.add_argument("-c", "--ctx-size", type=positive, metavar="N",
                        help=f"tokens of the whole conversation (up to {CONTEXT})")  # fmt: skip
    add_session_argument(parser, "the conversation")
    add_sampling_arguments(parser)
    add_draft_argument(parser)
    add_model_arguments(parser)


def main(args: Namespace) -> None:
    utf8(args.system or "", "--system")
    with open_bundle(args.model, args.memory) as bundle:
        context = args.ctx_size or min(bundle.config.max_position_embeddings, CONTEXT)
        kept = Kept(args.session, bundle)
        tokenizer = chat_tokenizer(bundle, context, args.memory)
    with progress_bars() as progress, open_model(args, args.model, context, progress) as model:
        conversation = Conversation(model, args.system, tokenizer)
        resume(model, conversation, kept, args.system)
        print(f"{args.model}; {HELP}", file=sys.stderr)
        if isinstance(sys.stdin, io.TextIOWrapper):
            # A line that is not UTF-8 is reported and left out, and the conversation goes on.
            sys.stdin.reconfigure(errors="surrogateescape")
        while (line := read_line(conversation.most_characters)) is not None:
            if line == "/exit":
                break
            if line.startswith("/"):
                command(conversation, line)
            elif line:
                reply(conversation, line, args)
            if line:
                kept.try_to_save(model, conversation.messages)


def resume(model: Model, conversation: Conversation, kept: Kept, system: str | None) -> None:
    """Go on with the conversation that the session holds. Raises UserError where another system
    message is asked for than it has."""
    if kept.messages:
        conversation.restore(kept.messages)
        if system not in (None, conversation.system):
            raise UserError(
                f"{kept.path}: its conversation has another system message; leave --system away, "
                "or name another file"
            )
    kept.load(model)
    if kept.stored:
        print(
            f"({kept.path}: {len(kept.messages)} messages, {kept.stored.kept} tokens read back)",
            file=sys.stderr,
        )


def read_line(most: int) -> str | None:
    """The next line that the user types, or None at the end of the input. Ctrl-C clears the line.

    A line of more than ``most`` characters, or that is not UTF-8, is reported and left out.
    """
    while True:
        try:
            line = raw_line(most)
            utf8(line or "", "the line")
            return line if line is None else line.strip()
        except UserError as error:
            print(f"flashinfer: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends the conversation)", file=sys.stderr)


def raw_line(most: int) -> str | None:
    """A line of standard input, or None at its end. Raises UserError where it is too long."""
    if sys.stdin.isatty():
        try:
            return input("> ")  # the terminal's line editing bounds its length
        except EOFError:
            return None
    line = sys.stdin.readline(most + 1)
    if len(line) <= most:
        return line or None
    while line and not line.endswith("\n"):
        line = sys.stdin.readline(most)
    raise UserError(f"the line has more than {most} characters, too many for the context")


def command(conversation: Conversation, line: str) -> None:
    """Do what a line such as "/reset" says."""
    name, _, text = line.partition(" ")
    if name == "/system":
        conversation.system = text.strip() or None
        conversation.reset()
    elif name == "/reset":
        conversation.reset()
    else:
        print(f"no command {name}; {HELP}", file=sys.stderr)


def reply(conversation: Conversation, line: str, args: Namespace) -> None:
    """Print the reply to a line as it comes."""
    try:
        pieces = conversation.say(
            line, args.predict, temperature=args.temp, top_k=args.top_k, top_p=args.top_p,
            seed=args.seed,
        )  # fmt: skip
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pieces.close()
            print(" (stopped)", end="", file=sys.stderr)
        print(flush=True)
    except UserError as error:
        print(f"flashinfer: {error}", file=sys.stderr)
        return
    model = conversation.model
    if model.position >= model.plan.context:
        print(f"(the context of {model.plan.context} tokens is full)", file=sys.stderr)
