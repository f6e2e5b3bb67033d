"""Write text: continue a prompt with a model.

Text goes to stdout as it comes, an account of what it took to stderr.
"""

import argparse
import sys
from importlib.resources import files
from io import StringIO
from pathlib import Path

from flashinfer import kernels
from flashinfer.cli.common import (
    add_json,
    id_list,
    model_bars,
    natural,
    positive,
    seed,
    share,
    size,
    temperature,
    write_json,
)
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError
from flashinfer.formats.files import opened_text
from flashinfer.model import Model
from flashinfer.paper.flash import IO
from flashinfer.paper.neuron_cache import POLICIES
from flashinfer.plan.memory import format_size, header_room
from flashinfer.plan.options import MODES
from flashinfer.plan.plan import unit_name
from flashinfer.plan.profile import boards
from flashinfer.text.tokenizer import TextStream, Tokenizer, utf8


def add_model_arguments(parser):
    """How to open a model; the same for every command that does."""
    parser.add_argument(
        "--memory", type=size, metavar="SIZE", help="budget of the whole process, such as 600M or "
        "2G (powers of 1024); default: what the cgroup and the machine have, less 5 %%",
    )  # fmt: skip
    parser.add_argument(
        "--window", type=positive, metavar="K",
        help="keep the neurons of the last K tokens; default: as many as the budget affords",
    )  # fmt: skip
    parser.add_argument(
        "--cache", choices=POLICIES, help="which neurons make room where memory is short: those "
        "used seldom and long ago, those used longest ago, or those outside the window; default: "
        "window where --window is given, else frecency",
    )  # fmt: skip
    parser.add_argument(
        "--neurons", choices=MODES, help="which neurons to use: those predicted to fire, or all "
        "(exact, and slow); default: predicted where the model is calibrated, and trained to have "
        "silent neurons",
    )  # fmt: skip
    parser.add_argument(
        "--warm", action=argparse.BooleanOptionalAction, help="begin with the experts of a mixture "
        "that calibration found used most; default: where most of them will soon be used",
    )  # fmt: skip
    parser.add_argument(
        "--io", choices=IO, default="auto",
        help="io_uring, threads: past the page cache, by one or the other; buffered: through it; "
        "default: the first of these that works",
    )  # fmt: skip
    parser.add_argument(
        "--device", metavar="PROFILE", help="what the flash can do: a file that flashinfer probe "
        f"-o wrote, or one of {', '.join(boards())} (estimates); default: what flashinfer probe "
        "measured here",
    )  # fmt: skip
    parser.add_argument("-t", "--threads", type=positive, help="default: the cores there are")


def add_arguments(parser):
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="a .flash file; default: the small one that comes with flashinfer (Python source)",
    )  # fmt: skip
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="default: begin a new text")
    prompt.add_argument("-f", "--file", metavar="FILE", help="a file that holds the prompt")
    prompt.add_argument("--tokens", type=id_list, metavar="IDS", help="token ids, such as 2,10,15")
    parser.add_argument("-n", "--predict", type=positive, default=64, metavar="N",
                        help="tokens to write (64)")  # fmt: skip
    parser.add_argument("-c", "--ctx-size", type=positive, metavar="N",
                        help="tokens to have room for; default: prompt and -n")  # fmt: skip
    add_sampling_arguments(parser)
    parser.add_argument("--ignore-eos", action="store_true", help="write on after an end of text")
    add_model_arguments(parser)
    add_json(parser)


def add_sampling_arguments(parser):
    """How the next token is chosen."""
    parser.add_argument(
        "--temp", type=temperature, default=0.8, help="temperature; 0: greedy (0.8)"
    )
    parser.add_argument("--top-k", type=natural, default=40, help="0: all (40)")
    parser.add_argument("--top-p", type=share, default=0.95, help="1: all (0.95)")
    parser.add_argument("-s", "--seed", type=seed, help="repeat the same choices")


def demo_model():
    """The path of the model that comes with the package."""
    path = Path(str(files("flashinfer") / "data" / "demo.flash"))
    if not path.exists():
        raise UserError("this installation has no demo model; name a .flash file")
    return path


def main(args):
    if "native" not in kernels.TWINS:
        print(
            "flashinfer: the compiled kernels are not installed; NumPy's are slower",
            file=sys.stderr,
        )
    path = demo_model() if args.model is None else args.model
    with Bundle(path, memory=header_room(args.memory)) as bundle:
        tokenizer = None if args.tokens else Tokenizer(bundle, args.memory)
        config = bundle.config
    ids = args.tokens or prompt_ids(args, tokenizer, config)
    context = args.ctx_size or min(len(ids) + args.predict, config.max_position_embeddings)
    with (
        model_bars() as progress,
        Model.open(
            path,
            memory=args.memory,
            window=args.window,
            neurons=args.neurons,
            context=context,
            threads=args.threads,
            io=args.io,
            cache=args.cache,
            device=args.device,
            warm=args.warm,
            progress=progress,
        ) as model,
    ):
        # Near the context's end fewer tokens than asked for are written.
        room = context - len(ids) + 1
        tokens = model.generate(
            ids, min(args.predict, room) if room > 0 else args.predict, args.temp, args.top_k,
            args.top_p, args.seed, stop_at_eos=not args.ignore_eos,
        )  # fmt: skip
        try:
            # Where the figures are to be read from stdout, the text goes beside them.
            write_text(tokens, ids, tokenizer, sys.stderr if args.json == "-" else sys.stdout)
        finally:
            if model.stats.token_ids:
                print_account(model, sys.stderr)
                write_json(args.json, model.stats.as_dict())
        if room < args.predict:
            print(f"(stopped: the context of {context} tokens is full)", file=sys.stderr)


def prompt_ids(args, tokenizer, config):
    """The prompt's token ids. Of one that is too long for the context little is read."""
    most = min(args.ctx_size or config.max_position_embeddings, config.max_position_embeddings)
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


def write_text(tokens, prompt, tokenizer, out):
    """Write the prompt and the tokens as they come: text, or ids where there is no tokenizer."""
    if tokenizer is None:
        for token in tokens:
            print(token, end=" ", file=out, flush=True)
    else:
        stream = TextStream(tokenizer)
        out.write("".join([stream.add(token) for token in prompt]))
        out.flush()
        for token in tokens:
            out.write(stream.add(token))
            out.flush()
        out.write(stream.end())
    print(file=out, flush=True)


def print_account(model, out):
    figures = model.stats.as_dict()
    stats = model.stats
    print(
        f"\nprompt      {stats.prompt.tokens} tokens, "
        f"{figures['prompt_tokens_per_second']:.1f} tokens/s\n"
        f"generation  {figures['generated_tokens']} tokens, "
        f"{figures['tokens_per_second']:.1f} tokens/s\n"
        f"flash       {figures['flash_bytes_per_token'] / 1e6:.2f} MB read per token, "
        f"{100 * figures['cache_hit_rate']:.1f} % of {unit_name(figures['neurons'])}s were in "
        "DRAM\n"
        f"memory      {format_size(figures['peak_rss_bytes'])} at most, of "
        f"{format_size(figures['memory_budget_bytes'])}; kernels: "
        f"{kernels.describe()}, reads: {model.flash.io}",
        file=out,
    )
    if stats.sparsity:
        share = 100 * stats.sparsity["target"]
        print(
            f"sparsity    thresholds in force, not exact: {share:.0f} % of the neurons are "
            f"taken as silent ({stats.sparsity['method']})",
            file=out,
        )
    if model.expected:
        print(
            f"expected    {model.expected.tokens_per_second:.1f} tokens/s, "
            f"{model.expected.bytes / 1e6:.2f} MB read per token",
            file=out,
        )
