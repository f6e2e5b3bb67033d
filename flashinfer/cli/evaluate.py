"""Measure how well a model predicts: perplexity, distance from other modes and engines, choices.

The text is cut into sequences of 1024 tokens, or of the model's context where that is shorter, and
each begins from an empty context. Logits for --against have to come from the same sequences, one
row for each token of the text. Of a server, KL divergence is a lower bound: the tokens that it does
not name count as one.
"""

import math
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import Any

from flashinfer.cli.common import (
    add_json,
    open_bundle,
    positive,
    progress_bars,
    text_ids,
    write_json,
)
from flashinfer.cli.evaluate_lines import accuracy_line, against_lines, modes_lines
from flashinfer.cli.model_options import add_model_arguments, open_model, options_of
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.errors import UserError
from flashinfer.formats.progress import Progress
from flashinfer.model import Model
from flashinfer.study.against import compare_logits, compare_server
from flashinfer.study.choices import answer, read_questions, tokenized
from flashinfer.study.modes import compare_modes
from flashinfer.study.perplexity import LOGIT_ROWS, SEQUENCE, evaluate
from flashinfer.study.server import Server, ids_by_text
from flashinfer.text.tokenizer import Tokenizer

MOST_NATS = 709  # e to the power of more is beyond float64
TOP = 20  # vLLM's limit, where it is not started with another


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="UTF-8 text that the model was not "
                      "calibrated on")  # fmt: skip
    what.add_argument("--choices", metavar="FILE", help="multiple choice: one JSON object a line, "
                      "in the form of HellaSwag or ARC")  # fmt: skip
    parser.add_argument("--tokens", type=positive, default=4096, metavar="N",
                        help="of the text to use (4096)")  # fmt: skip
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument(
        "--modes", action="store_true", help="all neurons, the predicted ones, and those that a "
        "perfect predictor would name, side by side: perplexities and KL divergence",
    )  # fmt: skip
    beside.add_argument(
        "--against", metavar="FILE|URL", help="another engine's logits for the same tokens: a "
        ".npy, .npz or .safetensors file of (tokens, vocabulary), or a trace; or an "
        "OpenAI-compatible server, such as http://localhost:8080/v1",
    )  # fmt: skip
    parser.add_argument("--top", type=positive, default=TOP, metavar="N", help="tokens that a "
                        f"server is asked to name after each token ({TOP})")  # fmt: skip
    add_model_arguments(parser)
    add_json(parser)


def main(args: Namespace) -> None:
    if args.choices and (args.modes or args.against):
        raise UserError("--modes and --against compare predictions of a --text, not --choices")
    if args.modes and args.neurons:
        raise UserError("--modes runs all modes; leave --neurons away")
    with progress_bars() as progress:
        if args.choices:
            figures, lines = _choices(args, progress)
        else:
            figures, lines = _text(args, progress)
    if args.json != "-":
        print("\n".join(lines))
    write_json(args.json, figures)


def _text(args: Namespace, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    """The figures of a text, and the lines for people."""
    tokenizer, config = _tokenizer(args)
    ids = text_ids(args.text, tokenizer, args.tokens)
    nbytes = len(tokenizer.decode(ids).encode("utf-8"))
    context = min(SEQUENCE, config.max_position_embeddings)
    if args.modes:
        return _modes(args, ids, nbytes, context, progress)
    server = None
    if args.against and args.against.startswith(("http://", "https://")):
        server = Server(args.against, args.top, config.vocab_size, ids_by_text(tokenizer))
    with open_model(args, args.model, context, progress, LOGIT_ROWS) as model:
        if args.against:
            return _against(args, model, ids, server, progress)
        nats, count = evaluate(model, ids, progress)
        figures = {
            **_mode(model),
            "tokens": count,
            "nats_per_token": nats,
            "perplexity": math.exp(nats) if nats < MOST_NATS else math.inf,
            "bits_per_byte": _bits_per_byte(nats, count, nbytes),
        }
    line = (
        f"{figures['neurons']}: perplexity {figures['perplexity']:.3f} a token, "
        f"{figures['bits_per_byte']:.3f} bits a byte, over {count} tokens"
    )
    return figures, [line]


def _modes(
    args: Namespace, ids: list[int], nbytes: int, context: int, progress: Progress
) -> tuple[dict[str, Any], list[str]]:
    found = compare_modes(args.model, ids, options_of(args, context=context), progress)
    modes = [
        {
            "neurons": result.mode,
            **asdict(result.perplexity),
            "bits_per_byte": _bits_per_byte(result.perplexity.nats_per_token, found.tokens, nbytes),
            "distance": result.distance and asdict(result.distance),
        }
        for result in found.results
    ]
    figures = {
        "tokens": found.tokens,
        "modes": modes,
        "layers": [asdict(layer) for layer in found.layers],
        "left_out": found.left_out,
    }
    return figures, modes_lines(found)


def _against(
    args: Namespace, model: Model, ids: list[int], server: Server | None, progress: Progress
) -> tuple[dict[str, Any], list[str]]:
    if server is None:
        found = compare_logits(model, ids, args.against, progress)
    else:
        found = compare_server(model, ids, server, progress)
    figures = {**_mode(model), "against": args.against, **asdict(found)}
    return figures, against_lines(found, model.plan.mode, args.against)


def _choices(args: Namespace, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    """The figures of multiple choice, and the line for people."""
    questions = read_questions(args.choices)
    tokenizer, config = _tokenizer(args)
    most, begin = config.max_position_embeddings, config.bos_token_id
    tokens = tokenized(questions, tokenizer.encode, most, begin, progress)
    tokenizer.close()
    context = max(len(ids) for question in tokens for ids in question.ids)
    with open_model(args, args.model, context, logit_rows=LOGIT_ROWS) as model:
        found = answer(model, tokens, progress)
        return {**_mode(model), **asdict(found)}, [accuracy_line(found, model.plan.mode)]


def _tokenizer(args: Namespace) -> tuple[Tokenizer, ModelConfig]:
    with open_bundle(args.model, args.memory) as bundle:
        return Tokenizer(bundle, args.memory), bundle.config


def _mode(model: Model) -> dict[str, Any]:
    return {"neurons": model.plan.mode, "sparsity": model.stats.as_dict()["sparsity"]}


def _bits_per_byte(nats: float, count: int, nbytes: int) -> float:
    return nats * count / math.log(2) / max(1, nbytes)
