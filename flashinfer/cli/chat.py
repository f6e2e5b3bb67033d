"""Talk with a model, by its own chat template.

/system TEXT sets what the model is told first, /reset forgets the conversation, /exit ends it;
Ctrl-C stops a reply, Ctrl-D ends the program.
"""

import sys

from flashinfer.cli.common import model_bars, positive
from flashinfer.cli.run import add_model_arguments, add_sampling_arguments
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError
from flashinfer.model import Model
from flashinfer.plan.memory import header_room
from flashinfer.text.chat import Conversation, chat_tokenizer
from flashinfer.text.tokenizer import utf8

HELP = "/system TEXT, /reset, /exit; Ctrl-C stops a reply"
CONTEXT = 2048  # tokens, where the model allows as many


def add_arguments(parser):
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("-n", "--predict", type=positive, default=512, metavar="N",
                        help="tokens of a reply, at most (512)")  # fmt: skip
    parser.add_argument("-c", "--ctx-size", type=positive, metavar="N",
                        help=f"tokens of the whole conversation (up to {CONTEXT})")  # fmt: skip
    add_sampling_arguments(parser)
    add_model_arguments(parser)


def main(args):
    utf8(args.system or "", "--system")
    with Bundle(args.model, memory=header_room(args.memory)) as bundle:
        context = args.ctx_size or min(bundle.config.max_position_embeddings, CONTEXT)
        tokenizer = chat_tokenizer(bundle, context, args.memory)
    with (
        model_bars() as progress,
        Model.open(
            args.model, memory=args.memory, window=args.window, neurons=args.neurons,
            context=context, threads=args.threads, io=args.io, cache=args.cache,
            device=args.device, warm=args.warm, progress=progress,
        ) as model,
    ):  # fmt: skip
        conversation = Conversation(model, args.system, tokenizer)
        print(f"{args.model}; {HELP}", file=sys.stderr)
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is only that
        while (line := read_line(conversation.most_characters)) is not None:
            if line == "/exit":
                break
            if line.startswith("/"):
                command(conversation, line)
            elif line:
                reply(conversation, line, args)


def read_line(most):
    """What the user types, or None at its end. Ctrl-C clears the line.

    A line of more than ``most`` characters, or that is not UTF-8, is left out, which is said.
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


def raw_line(most):
    """A line of standard input, or None at its end. Raises UserError where it is too long."""
    if sys.stdin.isatty():
        try:
            return input("> ")  # with a terminal's editing, which bounds it
        except EOFError:
            return None
    line = sys.stdin.readline(most + 1)
    if len(line) <= most:
        return line or None
    while line and not line.endswith("\n"):
        line = sys.stdin.readline(most)
    raise UserError(f"the line has more than {most} characters, too many for the context")


def command(conversation, line):
    name, _, text = line.partition(" ")
    if name == "/system":
        conversation.system = text.strip() or None
        conversation.reset()
    elif name == "/reset":
        conversation.reset()
    else:
        print(f"no command {name}; {HELP}", file=sys.stderr)


def reply(conversation, line, args):
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
