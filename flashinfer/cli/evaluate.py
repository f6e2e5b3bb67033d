"""Measure how well a model predicts a text: its perplexity, exact or with predicted neurons."""

import math
from argparse import ArgumentParser, Namespace

from flashinfer.cli.common import (
    add_json,
    open_bundle,
    positive,
    progress_bars,
    text_ids,
    write_json,
)
from flashinfer.cli.model_options import add_model_arguments, open_model
from flashinfer.study.perplexity import LOGIT_ROWS, SEQUENCE, evaluate
from flashinfer.text.tokenizer import Tokenizer

MOST_NATS = 709  # e to the power of more is beyond float64


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text that the model "
                        "was not calibrated on")  # fmt: skip
    parser.add_argument("--tokens", type=positive, default=4096, metavar="N",
                        help="of the text to use (4096)")  # fmt: skip
    add_model_arguments(parser)
    add_json(parser)


def main(args: Namespace) -> None:
    with open_bundle(args.model, args.memory) as bundle:
        tokenizer = Tokenizer(bundle, args.memory)
        context = min(SEQUENCE, bundle.config.max_position_embeddings)
    ids = text_ids(args.text, tokenizer, args.tokens)
    nbytes = len(tokenizer.decode(ids).encode("utf-8"))
    with (
        progress_bars() as progress,
        open_model(args, args.model, context, logit_rows=LOGIT_ROWS) as model,
    ):
        nats, count = evaluate(model, ids, progress)
        figures = {
            "neurons": model.plan.mode,
            "sparsity": model.stats.as_dict()["sparsity"],
            "tokens": count,
            "nats_per_token": nats,
            "perplexity": math.exp(nats) if nats < MOST_NATS else math.inf,
            "bits_per_byte": nats * count / math.log(2) / max(1, nbytes),
        }
    if args.json != "-":
        print(
            f"{figures['neurons']}: perplexity {figures['perplexity']:.3f} a token, "
            f"{figures['bits_per_byte']:.3f} bits a byte, over {count} tokens"
        )
    write_json(args.json, figures)
