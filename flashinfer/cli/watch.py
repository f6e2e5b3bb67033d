"""See a run happen: a page that plays it token by token, layer by layer, read by read.

The page is one file without network access. It shows which neurons were predicted and which fired,
what was in DRAM and what was read, the cache's slots, and computing and reads on two clocks; and it
plans the same run with another memory, window, disk, or with an idea of the paper switched off.
--live serves the page on this machine while the model runs. What is recorded takes memory beyond
the budget.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flashinfer.cli.common import (
    add_json,
    open_bundle,
    positive,
    progress_bars,
    write_json,
)
from flashinfer.cli.model_options import add_model_arguments, add_sampling_arguments, open_model
from flashinfer.cli.prompt import add_text_arguments, prompt_ids
from flashinfer.cli.recording import measured_device, recorded, teller
from flashinfer.formats.bundle.layout import TOKENIZER
from flashinfer.model import Model
from flashinfer.study.watch.live import LiveServer
from flashinfer.study.watch.page import described, filled, told
from flashinfer.study.watch.recorder import Recorder
from flashinfer.text.tokenizer import Tokenizer

TOLD = ("prompt_tokens", "generated_tokens", "token_ids")  # of a generation's figures
SECONDS = 2.0  # that a page has to fetch the last tokens


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    add_text_arguments(parser)
    parser.add_argument("-n", "--predict", type=positive, default=64, metavar="N",
                        help="tokens to write (64)")  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", default="watch.html",
                        help="the page to write (watch.html)")  # fmt: skip
    parser.add_argument("--live", action="store_true",
                        help="serve the page on 127.0.0.1 while the model runs")  # fmt: skip
    add_sampling_arguments(parser)
    add_model_arguments(parser)
    add_json(parser)


def main(args: Namespace) -> None:
    with open_bundle(args.model, args.memory) as bundle:
        config = bundle.config
        without = args.tokens and bundle.where(TOKENIZER) is None
        tokenizer = None if without else Tokenizer(bundle, args.memory)
    ids = args.tokens or []
    if tokenizer is not None and not ids:
        ids = prompt_ids(args, tokenizer, config)
    context = min(len(ids) + args.predict, config.max_position_embeddings)
    most = min(args.predict, context - len(ids) + 1)
    with progress_bars() as progress:
        device = measured_device(args, Path(args.model), progress)
        with open_model(args, args.model, context, progress) as model:
            tokens = model.generate(ids, most, args.temp, args.top_k, args.top_p, args.seed)
            with recorded(model, args.output, ids, tokenizer, device, progress) as recording:
                if args.live:
                    with serving(model, recording.recorder, tokenizer, ids) as live:
                        for token in tokens:
                            live(token)
                else:
                    for number, _ in enumerate(tokens):
                        progress("record", number + 1, most)
                    progress("record", most, most)
            stats = model.stats.as_dict()
    if tokenizer is not None:
        tokenizer.close()
    if args.json != "-":
        print(f"{args.output}: open it in a browser")
    write_json(args.json, {**recording.figures, **{name: stats[name] for name in TOLD}})


@contextmanager
def serving(
    model: Model, recorder: Recorder, tokenizer: Tokenizer | None, ids: Sequence[int]
) -> Iterator[Callable[[int], None]]:
    """A page on this machine that shows the run as it goes; yields a function to tell it a token.

    When the block ends the page is told so, and has SECONDS to fetch the rest.
    """
    piece = teller(tokenizer)
    pieces: list[str] = []
    shown = 0
    data = {**described(model, "A run, as it happens", model.bundle.path.name, piece(ids)),
            "runs": [], "live": True, "planned": None}  # fmt: skip
    with LiveServer(filled(data)) as server:

        def tell(token: int) -> None:
            nonlocal shown
            pieces.append(piece([token]))
            done = recorder.runs[shown:]
            for run in told(done, pieces[shown : shown + len(done)], list_reads=True):
                server.add(run)
            shown += len(done)

        print(f"the run is shown at {server.address}", file=sys.stderr, flush=True)
        yield tell
        server.finish(SECONDS)
