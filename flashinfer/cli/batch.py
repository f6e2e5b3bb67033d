"""Write many texts together, which share what is read: for throughput instead of latency.

A line of PROMPTS is a JSON object with a "prompt" (a text) or "tokens" (ids) and, where it differs
from the arguments, "max_tokens", "temperature", "top_k", "top_p", "seed"; an "id" is passed on.
Each text is the one that flashinfer run writes with the same settings. What is done is skipped when
the same command is run again.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Protocol

from flashinfer.cli.batch_lines import Line, Settings, Written, WrongLine, lines_of
from flashinfer.cli.common import add_json, open_bundle, positive, progress_bars, whole, write_json
from flashinfer.cli.model_options import add_model_arguments, add_sampling_arguments, options_of
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.bundle.layout import TOKENIZER
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.errors import UserError
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.generation.batch import Request, Writing
from flashinfer.generation.sampling import Sampler
from flashinfer.model import Model
from flashinfer.plan.memory import format_size
from flashinfer.plan.options import MOST_TEXTS
from flashinfer.text.tokenizer import TextStream, Tokenizer, utf8

MOST_NAMED = 20  # wrong lines, of which each is named
# What ``--json`` has in common with that of ``run``.
SHARED = (
    "prompt_tokens", "passes", "tokens_per_second", "flash_bytes_per_token",
    "cache_hit_rate", "peak_rss_bytes", "memory_budget_bytes", "context", "neurons", "kv_dtype",
)  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("prompts", metavar="PROMPTS", help="a file, one JSON object a line")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="one JSON object a text, as it is "
        "done; a file that is there already is added to",
    )  # fmt: skip
    add_batch_arguments(parser)
    add_json(parser)


def add_batch_arguments(parser: ArgumentParser) -> None:
    """How the texts are written: what ``Work`` and ``open_for`` take."""
    parser.add_argument("-n", "--predict", type=positive, default=64, metavar="N",
                        help="tokens to write for each (64)")  # fmt: skip
    parser.add_argument(
        "-c", "--ctx-size", type=positive, metavar="N",
        help="tokens of the longest text; default: what the prompts need",
    )  # fmt: skip
    parser.add_argument(
        "--texts", type=whole(1, MOST_TEXTS), metavar="N",
        help="texts to write at a time; default: as many as give the most tokens a second",
    )  # fmt: skip
    add_sampling_arguments(parser)
    parser.add_argument("--ignore-eos", action="store_true", help="write on after an end of text")
    add_model_arguments(parser)


def main(args: Namespace) -> None:
    with open_bundle(args.model, args.memory) as bundle:
        bundle.config.refuse_encoder(args.model)
        config, digest = bundle.config, bundle.digest
        tokenizer = None if bundle.where(TOKENIZER) is None else Tokenizer(bundle, args.memory)
    with closing(Written(args.output)) as written, progress_bars() as progress:
        work = Work(args, config, digest, tokenizer, written)
        count, context = work.survey(progress)
        if count:
            with open_for(args, work, count, context, progress) as model:
                try:
                    work.write(model, count, progress)
                finally:
                    print_account(model, work)
                    write_json(args.json, figures(model, work))
        else:
            write_json(args.json, work.counts())
        print(f"{args.output}: {work.skipped + work.done} texts", file=sys.stderr)
    if work.wrong:
        raise UserError(f"{args.prompts}: {work.wrong} lines are wrong, and have no text")


def open_for(args: Namespace, work: "Work", count: int, context: int, progress: Progress) -> Model:
    """The Model for ``count`` texts, of which the longest has ``context`` tokens."""
    if work.tokenizer is not None:
        work.tokenizer.stay(context)
    texts, fewer = args.texts or min(count, MOST_TEXTS), args.texts is None
    return Model.open(
        args.model, options_of(args, context=context, texts=texts, fewer=fewer), progress
    )


class Sink(Protocol):
    """Where texts go when they are done."""

    def check(self, line: Line, key: str) -> bool:
        """Whether a line's text is there already."""

    def write(self, entry: JsonObject, prompt: Sequence[int]) -> None:
        """Take a text: what is written of it, and the token ids of its prompt."""


class Work:
    """The prompts of a file, but for those that are done or wrong.

    digest  of the model; default: Settings from the arguments
    skipped, done, wrong  counts of texts: that were there, that are written, that cannot be
    """

    def __init__(
        self,
        args: Namespace,
        config: ModelConfig,
        digest: str,
        tokenizer: Tokenizer | None,
        written: Sink,
    ) -> None:
        self.args, self.config, self.tokenizer, self.written = args, config, tokenizer, written
        self.model = [digest, args.neurons, args.kv_dtype, args.ignore_eos]
        self.default = Settings(args.predict, args.temp, args.top_k, args.top_p, args.seed)
        self.ends = () if args.ignore_eos else config.eos_token_ids
        self.wrong = self.skipped = self.done = 0

    def survey(self, progress: Progress) -> tuple[int, int]:
        """(texts to write, tokens of context that the longest of them needs)."""
        count, longest = 0, 1
        for line, ids in self._lines(first=True, progress=progress):
            count, longest = count + 1, max(longest, len(ids) + line.settings.max_tokens - 1)
        return count, self.args.ctx_size or longest

    def counts(self) -> JsonObject:
        """How many texts were written, were there already, and are wrong."""
        return {"texts": self.done, "skipped": self.skipped, "wrong": self.wrong}

    def write(self, model: Model, count: int, progress: Progress) -> None:
        """Write the texts, ``count`` of them, each to its line as soon as it is done."""
        lines: dict[int, Line] = {}
        for writing in model.write(self._requests(lines)):
            request = writing.request
            entry = self._entry(lines.pop(request.number), writing)
            self.written.write(entry, request.prompt)
            self.done += 1
            progress("batch", self.done, count)

    def _requests(self, lines: dict[int, Line]) -> Iterator[Request]:
        """Yield what the model is asked for; ``lines`` holds the line of each by its number."""
        for line, ids in self._lines():
            lines[line.number], settings = line, line.settings
            yield Request(line.number, ids, settings.max_tokens, Sampler(*settings[1:]), self.ends)

    def _entry(self, line: Line, writing: Writing) -> JsonObject:
        """The JSON object of a text that is done."""
        ids = writing.token_ids
        entry: JsonObject = {"line": line.number, "key": line.key(self.model)}
        if line.id is not None:
            entry["id"] = line.id
        if self.tokenizer is not None:
            stream = TextStream(self.tokenizer, writing.request.prompt)
            entry["text"] = "".join([stream.add(token) for token in ids]) + stream.end()
        ended = bool(ids) and ids[-1] in self.ends
        return {**entry, "token_ids": ids, "finish": "end" if ended else "length"}

    def _lines(
        self, first: bool = False, progress: Progress = no_progress
    ) -> Iterator[tuple[Line, list[int]]]:
        """Yield each line that is to be written, and its token ids. The ``first`` time what is
        wrong or done is counted, and what is wrong is named."""
        for line in lines_of(self.args.prompts, self.default, progress):
            if isinstance(line, Line) and self.written.check(line, line.key(self.model)):
                self.skipped += first
                continue
            try:
                if isinstance(line, WrongLine):
                    raise UserError(line.why)
                yield line, self._ids(line)
            except UserError as error:
                self.wrong += first
                if first and self.wrong <= MOST_NAMED:
                    print(f"flashinfer: {self.args.prompts}: line {line.number}: {error}",
                          file=sys.stderr)  # fmt: skip

    def _ids(self, line: Line) -> list[int]:
        """The token ids of a line. Raises UserError where the model cannot take them."""
        ids = line.prompt
        if isinstance(ids, str):
            if self.tokenizer is None:
                raise UserError('the model has no tokenizer; give "tokens"')
            utf8(ids, "the prompt")
            begin = self.config.bos_token_id
            ids = self.tokenizer.encode(ids) or ([] if begin is None else [begin])
        if not ids:
            raise UserError("the prompt is empty, and the model has no token that begins a text")
        strange = [id for id in ids if id >= self.config.vocab_size]
        if strange:
            raise UserError(f"token id {strange[0]} is not below {self.config.vocab_size}")
        most = self.config.max_position_embeddings
        most = min(self.args.ctx_size or most, most)
        needed = len(ids) + line.settings.max_tokens - 1
        if needed > most:
            raise UserError(f"{needed} tokens do not fit the context of {most}")
        return ids


def figures(model: Model, work: Work) -> JsonObject:
    """The figures of ``--json``."""
    phase, stats = model.stats.generation, model.stats.as_dict()
    return {
        **work.counts(),
        "texts_at_a_time": model.plan.texts,
        "seconds": phase.seconds,
        "flash_bytes": phase.flash_bytes,
        "generated_tokens": phase.tokens,
        **{key: stats[key] for key in SHARED},
    }


def print_account(model: Model, work: Work) -> None:
    """What the texts took: time, reads, memory."""
    stats, phase = model.stats.as_dict(), model.stats.generation
    print(
        f"\ntexts       {work.done} written, up to {model.plan.texts} at a time\n"
        f"prompts     {stats['prompt_tokens']} tokens processed\n"
        f"generation  {phase.tokens} tokens in {stats['passes']} passes, "
        f"{phase.tokens_per_second:.1f} tokens/s\n"
        f"flash       {phase.bytes_per_token / 1e6:.2f} MB read per token written\n"
        f"memory      {format_size(stats['peak_rss_bytes'])} at most, of "
        f"{format_size(stats['memory_budget_bytes'])}",
        file=sys.stderr,
    )
