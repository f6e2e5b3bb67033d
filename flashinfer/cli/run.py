"""Write text: continue a prompt with a model.

Text goes to stdout as it comes, an account of what it took to stderr.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import TextIO

from flashinfer import kernels
from flashinfer.cli.common import (
    add_json,
    id_list,
    open_bundle,
    positive,
    progress_bars,
    write_json,
)
from flashinfer.cli.model_options import (
    add_draft_argument,
    add_model_arguments,
    add_sampling_arguments,
    open_model,
)
from flashinfer.cli.prompt import prompt_ids
from flashinfer.cli.recording import measured_device, recorded
from flashinfer.cli.session import Kept, add_session_argument
from flashinfer.formats.bundle.layout import TOKENIZER
from flashinfer.formats.errors import UserError
from flashinfer.model import Model
from flashinfer.plan.memory import format_size
from flashinfer.plan.plan import unit_name
from flashinfer.text.tokenizer import TextStream, Tokenizer


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="a .flash file, or a GGUF file, which is read where it lies; default: the small model "
        "that comes with flashinfer (Python source)",
    )  # fmt: skip
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="default: begin a new text")
    prompt.add_argument("-f", "--file", metavar="FILE", help="a file that holds the prompt")
    prompt.add_argument("--tokens", type=id_list, metavar="IDS", help="token ids, such as 2,10,15")
    parser.add_argument("-n", "--predict", type=positive, default=64, metavar="N",
                        help="tokens to write (64)")  # fmt: skip
    parser.add_argument("-c", "--ctx-size", type=positive, metavar="N",
                        help="tokens to have room for; default: prompt and -n")  # fmt: skip
    add_session_argument(parser, "the text")
    add_sampling_arguments(parser)
    parser.add_argument("--ignore-eos", action="store_true", help="write on after an end of text")
    parser.add_argument("--record", metavar="FILE", help="write a page that plays the run, token "
                        "by token, as flashinfer watch does; nothing is drafted then")  # fmt: skip
    add_draft_argument(parser)
    add_model_arguments(parser)
    add_json(parser)


def demo_model() -> Path:
    """The path of the model that comes with the package. Raises UserError where it is missing."""
    path = Path(str(files("flashinfer") / "data" / "demo.flash"))
    if not path.exists():
        raise UserError("this installation has no demo model; name a .flash file")
    return path


def main(args: Namespace) -> None:
    if "native" not in kernels.TWINS:
        print(
            "flashinfer: the compiled kernels are not installed; NumPy's are slower",
            file=sys.stderr,
        )
    path = demo_model() if args.model is None else args.model
    with open_bundle(path, args.memory) as bundle:
        kept, config = Kept(args.session, bundle), bundle.config
        goes_on = kept.token_ids and not (args.prompt or args.file or args.tokens)
        # Without a tokenizer a text that was given as ids goes on as ids.
        as_ids = args.tokens or (goes_on and bundle.where(TOKENIZER) is None)
        tokenizer = None if as_ids else Tokenizer(bundle, args.memory)
    ids = args.tokens or kept.token_ids
    if tokenizer is not None:
        ids = ids if goes_on else prompt_ids(args, tokenizer, config)
        tokenizer.close()
    stored = kept.stored.kept if kept.stored else 0
    context = min(max(len(ids) + args.predict, stored), config.max_position_embeddings)
    context = args.ctx_size or context
    with progress_bars() as progress, ExitStack() as stack:
        if args.record:  # tokens that share a pass would not be seen one by one
            args.draft = "off"
            device = measured_device(args, Path(path), progress)
        model = stack.enter_context(open_model(args, path, context, progress))
        kept.load(model)
        if args.record:
            stack.enter_context(recorded(model, args.record, ids, tokenizer, device, progress))
        # Fewer tokens than asked for are written where the context ends before.
        room = context - len(ids) + 1
        tokens = model.generate(
            ids, min(args.predict, room) if room > 0 else args.predict, args.temp, args.top_k,
            args.top_p, args.seed, stop_at_eos=not args.ignore_eos, reuse=True,
        )  # fmt: skip
        try:
            # The text must not mix with the figures where those go to stdout.
            write_text(tokens, ids, tokenizer, sys.stderr if args.json == "-" else sys.stdout)
        except UserError:
            kept.leave()
            raise
        finally:
            stats = model.stats
            if stats.token_ids:
                print_account(model, sys.stderr)
            kept.save(model, ids + stats.token_ids)
            if stats.token_ids:
                resumed = len(ids) - stats.prompt.tokens
                kept.print_account(resumed, len(ids), sys.stderr)
                write_json(args.json, {**stats.as_dict(), "session": kept.as_dict(resumed)})
        if room < args.predict:
            print(f"(stopped: the context of {context} tokens is full)", file=sys.stderr)


def write_text(
    tokens: Iterable[int], prompt: list[int], tokenizer: Tokenizer | None, out: TextIO
) -> None:
    """Write the prompt and the tokens as they come: as text, or as ids without a tokenizer."""
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


def print_account(model: Model, out: TextIO) -> None:
    """What the text took: time, reads, memory."""
    figures, stats = model.stats.as_dict(), model.stats
    unit = unit_name(figures["neurons"], model.config)
    print(
        f"\nprompt      {stats.prompt.tokens} tokens, "
        f"{figures['prompt_tokens_per_second']:.1f} tokens/s\n"
        f"generation  {figures['generated_tokens']} tokens, "
        f"{figures['tokens_per_second']:.1f} tokens/s\n"
        f"flash       {figures['flash_bytes_per_token'] / 1e6:.2f} MB read per token, "
        f"{100 * figures['cache_hit_rate']:.1f} % of {unit}s were in DRAM\n"
        f"memory      {format_size(figures['peak_rss_bytes'])} at most, of "
        f"{format_size(figures['memory_budget_bytes'])}; kernels: "
        f"{kernels.describe()}, reads: {model.flash.io}",
        file=out,
    )
    drafts = stats.drafts
    if drafts.drafted:
        print(
            f"drafts      {drafts.drafted} tokens in {drafts.passes} passes, of which "
            f"{drafts.accepted} were right",
            file=out,
        )
    if stats.sparsity:
        share = 100 * stats.sparsity.target
        print(
            f"sparsity    thresholds in force, not exact: {share:.0f} % of the neurons are "
            f"taken as silent ({stats.sparsity.method})",
            file=out,
        )
    if model.expected:
        print(
            f"expected    {model.expected.tokens_per_second:.1f} tokens/s, "
            f"{model.expected.bytes / 1e6:.2f} MB read per token",
            file=out,
        )
