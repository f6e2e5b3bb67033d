"""Say how well a model foretells a text: its perplexity, exact or with predicted neurons."""

import math

from tqdm import tqdm

from flashinfer.cli.common import add_json, positive, text_ids, write_json
from flashinfer.cli.run import add_model_arguments
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.model import Model
from flashinfer.plan.memory import header_room
from flashinfer.study.perplexity import LOGIT_ROWS, SEQUENCE, evaluate
from flashinfer.text.tokenizer import Tokenizer

MOST_NATS = 709  # e to more than this is beyond float64


def add_arguments(parser):
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text that the model "
                        "was not calibrated on")  # fmt: skip
    parser.add_argument("--tokens", type=positive, default=4096, metavar="N",
                        help="of the text to use (4096)")  # fmt: skip
    add_model_arguments(parser)
    add_json(parser)


def main(args):
    with Bundle(args.model, memory=header_room(args.memory)) as bundle:
        tokenizer = Tokenizer(bundle, args.memory)
        context = min(SEQUENCE, bundle.config.max_position_embeddings)
    ids = text_ids(args.text, tokenizer, args.tokens)
    nbytes = len(tokenizer.decode(ids).encode("utf-8"))
    with Model.open(
        args.model, memory=args.memory, window=args.window, neurons=args.neurons, context=context,
        threads=args.threads, io=args.io, cache=args.cache, device=args.device,
        warm=args.warm, logit_rows=LOGIT_ROWS,
    ) as model, tqdm(desc="evaluate", unit="token", leave=False, delay=1) as bar:  # fmt: skip

        def progress(done, total):
            bar.total = total
            bar.update(done - bar.n)

        nats, count = evaluate(model, ids, progress)
        figures = {
            "neurons": model.plan.neurons,
            "sparsity": model.stats.sparsity,
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
