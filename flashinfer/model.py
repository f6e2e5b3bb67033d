"""A model that writes: what it may be asked for. Opening it, and logits, are in opened.py."""

from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from flashinfer import kernels
from flashinfer.formats.errors import UserError
from flashinfer.generation.batch import Batch, Request, Writing
from flashinfer.generation.drafts import Drafter
from flashinfer.generation.sampling import Sampler
from flashinfer.generation.session import Message, Session, SessionFile, Setting, save
from flashinfer.generation.speculation import Drafting, drawn
from flashinfer.opened import OpenedModel
from flashinfer.stats import measured
from flashinfer.transformer.text import Part


class Model(OpenedModel):
    """A model whose feed-forward weights stay on flash. One thread, and one text, at a time.

        with Model.open("x.flash", memory="600M") as model:
            for token in model.generate([2, 10, 15], max_new_tokens=64, temperature=0):
                ...

    See OpenedModel for its attributes, and for logits.
    """

    def generate(
        self,
        token_ids: Iterable[int],
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        seed: int | None = None,
        stop_at_eos: bool = True,
        reuse: bool = False,
        drafter: Drafter | None = None,
    ) -> Generator[int, None, None]:
        """Yield up to ``max_new_tokens`` token ids that continue ``token_ids``.

        Tokens are drafted, and several checked in one pass, where that is faster (the option
        ``draft``): the same tokens, sooner. drafter: where drafts come from; None: what the option
        says.

        Starts from an empty context or, with ``reuse``, from what of ``token_ids`` is in the
        key/value cache already: the same tokens, sooner. The end-of-text token is yielded, and
        is the last one. Raises UserError, in the middle as well, where the model was given another
        text or closed.
        """
        sampler = Sampler(temperature, top_k, top_p, seed)
        ids = self._checked_prompt(token_ids, max_new_tokens)
        ends = self.config.eos_token_ids if stop_at_eos else frozenset()
        with self.turns.alone():
            del self.ids[self.text.in_common(ids[:-1]) if reuse else 0 :]
            first, ids = len(ids), ids[self.position :]
            self.stats = self._new_stats()
            with measured(self.stats.prompt, len(ids), self.passes.counters):
                logits = self._forward(ids)
            self.turns.begun = text = object()
        drafting = Drafting(drafter or self.drafter, sampler, self.pace, self.stats.drafts)
        self.pace.begin(max_new_tokens)
        told = self.stats.token_ids
        try:
            tokens = [sampler(logits)] if max_new_tokens else []
            while tokens:
                for token in tokens:
                    told.append(token)
                    yield token
                left = max_new_tokens - len(told)
                if not left or token in ends:
                    return
                with self.turns.alone(text):
                    tokens = self._next_tokens(token, sampler, drafting, left, ends)
        finally:
            self._forget_untold(text, first + max(0, len(told) - 1))

    def _next_tokens(
        self, token: int, sampler: Sampler, drafting: Drafting, most: int, ends: Collection[int]
    ) -> list[int]:
        """Process a token, the last of the text, and drafts -> the next tokens, at most ``most``;
        one of ``ends`` ends them."""
        draft = drafting.draft([*self.ids, token], min(most - 1, self.plan.drafts))
        phase = self.stats.generation
        before = phase.seconds
        with measured(phase, 1, self.passes.counters):
            if draft:
                ids = self.checked([token, *draft])
                with np.errstate(over="ignore", invalid="ignore"):
                    rows = self.decoder.logits(self._hidden(ids, sure=1))
            else:
                rows = self._forward([token])[None]
        tokens = drawn(sampler, rows, draft, ends)
        if draft:
            self.passes.settle(self.text, len(draft), len(tokens) - 1)
        drafting.learn(len(draft), len(tokens), phase.seconds - before)
        phase.tokens += len(tokens) - 1
        phase.seconds += drafting.seconds
        return tokens

    def _forget_untold(self, text: object, told: int) -> None:
        """Where a generation ends in the middle of what one pass gave, the key/value cache keeps
        the first ``told`` tokens alone, as if they had come one by one."""
        with suppress(UserError), self.turns.alone(text):
            del self.ids[told:]

    def generate_many(
        self,
        prompts: Iterable[Iterable[int]],
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        seed: int | None = None,
        stop_at_eos: bool = True,
    ) -> Iterator[Writing]:
        """Continue many texts, given as token ids; see ``write``.

        Each has the tokens that ``generate`` gives for the same prompt and settings, the same seed
        included.
        """
        ends = self.config.eos_token_ids if stop_at_eos else frozenset()
        return self.write(
            Request(
                number, list(ids), max_new_tokens, Sampler(temperature, top_k, top_p, seed), ends
            )
            for number, ids in enumerate(prompts)
        )

    def write(self, requests: Iterable[Request]) -> Generator[Writing, None, None]:
        """Write texts, as many at a time as the option ``texts`` says, which share each pass.

        Yields each when it is done, with its ``request`` and its ``token_ids``: the same, whatever
        the others are. A request is taken when there is room for it. Raises UserError as
        ``generate`` does.
        """
        batch = Batch(self.texts, map(self.checked_request, requests), self.plan.chunk)
        self.stats, text = self._new_stats(), object()
        with self.turns.alone():
            self.turns.begun = text
        while True:
            with self.turns.alone(text), measured(self.stats.generation, 0, self.passes.counters):
                parts = batch.parts()
                if not parts:
                    return
                done = self._write(batch, parts)
            yield from done

    def _write(self, batch: Batch, parts: list[Part]) -> list[Writing]:
        """A pass of a Batch; the texts that are done."""
        done: list[Writing] = []
        with np.errstate(over="ignore", invalid="ignore"):
            h = self.passes(parts)
            rows = batch.rows(parts)
            if rows:
                done = list(batch.draw(self.decoder.logits(h[rows])))
        self.stats.generation.tokens += len(rows)
        self.stats.prompt.tokens += len(h) - len(rows)
        self.stats.drafts.passes += 1
        return done

    def checked_request(self, request: Request) -> Request:
        """The request. Raises UserError where this model cannot meet it."""
        if request.most < 1:
            raise UserError(f"{request.most} new tokens cannot be generated")
        self._checked_prompt(request.prompt, request.most)
        self._checked_ids(request.prompt)
        return request

    def _checked_prompt(self, token_ids: Iterable[int], max_new_tokens: int) -> list[int]:
        self.config.refuse_encoder(self.bundle.path)
        if max_new_tokens < 0:
            raise UserError(f"{max_new_tokens} new tokens cannot be generated")
        ids = list(token_ids)
        needed = len(ids) + max(0, max_new_tokens - 1)
        if needed > self.plan.context:
            raise UserError(
                f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones need a context of "
                f"{needed}; it is {self.plan.context}, the model's most is "
                f"{self.config.max_position_embeddings}"
            )
        return ids

    def save_session(
        self,
        path: Path | str,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Message] = (),
    ) -> None:
        """Write a text, with its keys and values as far as they are in the key/value cache, to
        ``path``, which is replaced when all of it is on the disk; see generation/session.py.

        token_ids  the text, whose last tokens need not have been processed; None: those in the
                   cache
        messages   of a conversation, to be found again
        Raises UserError where the file cannot be written; what stood there stays.
        """
        self.config.refuse_encoder(self.bundle.path)
        with self.turns.alone(self.turns.begun):
            ids = list(self.ids if token_ids is None else token_ids)
            if ids:
                self._checked_ids(ids)
            if len(ids) > self.config.max_position_embeddings + 1:
                raise UserError(f"{len(ids)} tokens are more than the model's positions")
            # Layers whose window has moved past this text compute it again when it goes on.
            kept = self.text.settled(self.text.in_common(ids))
            save(path, self._setting(), self.text.caches, Session(ids, kept, list(messages)))

    def load_session(self, path: Path | str) -> Session:
        """Read a session into the key/value cache, in place of what it holds; returns it.

        ``generate(session.token_ids, reuse=True)`` goes on with it, with the bits that it would
        have had without the stop. Raises UserError where another option would be right, and
        FormatError where the file is of another model, cut or changed: the context is empty then,
        or as it was.
        """
        self.config.refuse_encoder(self.bundle.path)
        with self.turns.alone(), SessionFile(path) as file:
            file.check_model(self.bundle)
            file.check(self._setting(), self.config)
            session = file.session(self.config)
            file.check_layers(self.text.caches)
            del self.ids[:]
            file.fill(self.text.caches)
            self.text.ids += session.token_ids[: session.kept]
            self.text.incomplete = False
        return session

    def _setting(self) -> Setting:
        plan, bundle = self.plan, self.bundle
        return Setting(
            bundle.digest, bundle.path.name, plan.mode, plan.kv_dtype, kernels.in_use, plan.context
        )
