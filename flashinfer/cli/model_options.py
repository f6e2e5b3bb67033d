"""The options of the commands that open a model."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any

from flashinfer.cli.common import natural, positive, seed, share, size, temperature
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.model import Model
from flashinfer.paper.neuron_cache import POLICIES
from flashinfer.paper.open_file import IO
from flashinfer.plan.options import MODES, Options
from flashinfer.plan.profile import boards
from flashinfer.transformer.kv_cache import KV_DTYPES


def add_model_arguments(parser: ArgumentParser) -> None:
    """How to open a model: the arguments that ``open_model`` takes."""
    parser.add_argument(
        "--memory", type=size, metavar="SIZE", help="budget of the whole process, such as 600M or "
        "2G (powers of 1024); default: what the cgroup and the machine have free, less 5 %%",
    )  # fmt: skip
    parser.add_argument(
        "--window", type=positive, metavar="K",
        help="keep the neurons of the last K tokens; default: as many as the budget affords",
    )  # fmt: skip
    parser.add_argument(
        "--cache", choices=POLICIES, help="which neurons are evicted where memory is short: those "
        "used seldom and long ago, those used longest ago, or those outside the window; default: "
        "window where --window is given, else frecency",
    )  # fmt: skip
    parser.add_argument(
        "--neurons", choices=MODES, help="which neurons to use: those predicted to fire, or all "
        "(exact, and slow); default: predicted where the model is calibrated, and was trained to "
        "have silent neurons",
    )  # fmt: skip
    parser.add_argument(
        "--kv-dtype", choices=KV_DTYPES, help="the number format of keys and values: q8_0 takes "
        "about half of f16's memory, f32 twice as much, and each moves logits by its own rounding; "
        "default: f32 where the attention's weights are f32, else f16",
    )  # fmt: skip
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where keys and values lie that do not fit the "
        "budget, in a file that is gone at the end; default: beside the model",
    )  # fmt: skip
    parser.add_argument(
        "--warm", action=BooleanOptionalAction, help="begin with those experts of a mixture in the "
        "cache that the calibration text used most; default: where most of them will soon be used",
    )  # fmt: skip
    parser.add_argument(
        "--io", choices=IO, default="auto",
        help="how to read: io_uring and threads bypass the page cache, buffered uses it; default: "
        "the first of these that works",
    )  # fmt: skip
    parser.add_argument(
        "--device", metavar="PROFILE", help="the speed of the flash: a file that flashinfer probe "
        f"-o wrote, or one of {', '.join(boards())} (estimates); default: what flashinfer probe "
        "measured here",
    )  # fmt: skip
    parser.add_argument("-t", "--threads", type=positive, help="default: the cores there are")


def add_draft_argument(parser: ArgumentParser) -> None:
    """What tokens are drafted."""
    parser.add_argument(
        "--draft", default="auto", metavar="auto|off|ngram|FILE", help="tokens are drafted, and "
        "several checked in one pass, where that is faster; the text stays the same. Drafts come "
        "from the text itself (auto, ngram), from a store that flashinfer surrogate made, or from "
        "a smaller model with the same tokenizer (FILE); off: none",
    )  # fmt: skip


def add_sampling_arguments(parser: ArgumentParser) -> None:
    """How the next token is chosen."""
    parser.add_argument(
        "--temp", type=temperature, default=0.8, help="temperature; 0: greedy (0.8)"
    )
    parser.add_argument("--top-k", type=natural, default=40, help="0: all (40)")
    parser.add_argument("--top-p", type=share, default=0.95, help="1: all (0.95)")
    parser.add_argument("-s", "--seed", type=seed, help="repeat the same choices")


def options_of(args: Namespace, **changes: Any) -> Options:
    """The Options that the arguments of ``add_model_arguments`` ask for, and these fields."""
    return Options(
        memory=args.memory, window=args.window, neurons=args.neurons, threads=args.threads,
        io=args.io, cache=args.cache, device=args.device, warm=args.warm, kv_dtype=args.kv_dtype,
        scratch=args.scratch,
        draft=getattr(args, "draft", "off"), **changes,
    )  # fmt: skip


def open_model(
    args: Namespace,
    path: Path | str,
    context: int,
    progress: Progress = no_progress,
    logit_rows: int = 1,
) -> Model:
    """The Model at ``path``, opened as the arguments of ``add_model_arguments`` say.

    context, logit_rows  see ``Options``
    """
    return Model.open(path, options_of(args, context=context, logit_rows=logit_rows), progress)
