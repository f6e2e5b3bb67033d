"""A model opened for use: what it may be asked, who may ask it, and when its weights are read."""

from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from flashinfer import kernels
from flashinfer.assembly import fill_caches, make_decoder
from flashinfer.drafters import OpenedDraft, opened_draft
from flashinfer.formats.arrays import Float32Array, Int64Array
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.generation.batch import Batch, Request, Writing
from flashinfer.generation.drafts import Drafter
from flashinfer.generation.pace import Pace
from flashinfer.generation.sampling import Sampler
from flashinfer.generation.session import Message, Session, SessionFile, Setting, save
from flashinfer.generation.speculation import Drafting, drawn
from flashinfer.loading import allocate_texts, key_value_file, load_weights
from flashinfer.paper.flash import aligned_bytes
from flashinfer.passes import Passes
from flashinfer.plan.options import Options
from flashinfer.plan.setup import Setup, opened, prepare
from flashinfer.stats import Stats, measured
from flashinfer.transformer.kv_flash import KeyValueFile
from flashinfer.transformer.layer import Layer
from flashinfer.transformer.text import Part
from flashinfer.transformer.values import TraceTap, widest
from flashinfer.turns import Turns

TRACED_BYTES = 2 << 20  # of a value that a trace may have to gather


class Model:
    """A model whose feed-forward weights stay on flash. One thread, and one text, at a time.

        with Model.open("x.flash", memory="600M") as model:
            for token in model.generate([2, 10, 15], max_new_tokens=64, temperature=0):
                ...

    config    ModelConfig; plan: plan.plan.Plan; stats: what the last calls took
    profile   profile.Profile of the flash, where ``flashinfer probe`` measured it, or None
    expected  cost.Cost of a token by that profile, or None
    """

    @classmethod
    def open(
        cls,
        path: Path | str | Bundle,
        options: Options | None = None,
        progress: Progress = no_progress,
        **changes: Any,
    ) -> "Model":
        """Open a bundle, by its path or opened already.

        options  Options; ``changes`` name some of its fields: Model.open(path, memory="600M")
        progress called as progress("load", bytes, bytes in all) while opening, and as
                 progress("prompt", share done, 1.0) during a prompt of several tokens

        Raises FormatError where the file is not sound, BudgetError where the memory is too little,
        UserError where an option is wrong.
        """
        options = replace(options or Options(), **changes)
        bundle, drafts = opened(path, options), OpenedDraft()
        try:
            drafts = opened_draft(options, bundle, cls.open)
            setup = prepare(bundle, options, drafts.base)
        except BaseException:
            bundle.close()
            drafts.close()
            raise
        return cls(bundle, setup, progress, drafts)

    def __init__(
        self, bundle: Bundle, setup: Setup, progress: Progress, drafts: OpenedDraft | None = None
    ) -> None:
        self.bundle, self.config, self.progress = bundle, bundle.config, progress
        self.flash, self.plan = setup.flash, setup.plan
        self.profile, self.expected = setup.profile, setup.expected
        self.pace = Pace(setup.pass_seconds, self.plan.drafts)
        self.drafts = drafts or OpenedDraft()
        self.drafter = self.drafts.with_text(self.plan.context) if self.plan.drafts else None
        flash = self.flash
        # Not by way of this model, which is thus freed when nobody holds it.
        self.turns = Turns(lambda: flash.fd < 0)
        self.kv_file: KeyValueFile | None = None
        try:
            kernels.set_threads(self.plan.threads)
            self.stats = self._new_stats()
            self._load(setup)
        except BaseException:
            self.close()
            raise

    def _load(self, setup: Setup) -> None:
        buffer = aligned_bytes(self.plan.buffers)
        weights = load_weights(self.bundle, self.plan, self.flash, buffer, self.progress)
        self.kv_file = key_value_file(self.bundle, self.plan, setup.scratch, self.flash)
        self.texts = allocate_texts(self.bundle, self.plan, self.kv_file)
        self.text = self.texts[0]  # that all but ``generate_many`` goes on with
        self.decoder = make_decoder(self.bundle, self.plan, self.flash, weights, buffer)
        self.passes = Passes(self.decoder, self.flash, self.kv_file, self.plan.chunk)
        fill_caches(self.layers, setup.uses, self.progress)

    # ------------------------------------------------------------------ computing

    def forward(self, token_ids: ArrayLike, every: bool = False) -> Float32Array:
        """Process tokens that follow those in the key/value cache.

        token_ids (T,) -> logits (vocab_size,) of the last, or with ``every`` (T, vocab_size),
        float32. A long prompt goes through the layers ``plan.chunk`` tokens at a time.
        Raises UserError where an id is not in the vocabulary or the context is full, and where
        another thread uses the model.
        """
        with self.turns.alone():
            return self._forward(token_ids, every)

    def _forward(self, token_ids: ArrayLike, every: bool = False) -> Float32Array:
        ids = self.checked(token_ids)
        rows = []
        # What a file's weights overflow to is found in the logits.
        with np.errstate(over="ignore", invalid="ignore"):
            for first in range(0, len(ids), self.plan.chunk):
                chunk = ids[first : first + self.plan.chunk]
                h = self._hidden(chunk, first / len(ids), len(chunk) / len(ids))
                if every:
                    rows.append(self.decoder.logits(h))
                elif first + len(chunk) == len(ids):
                    rows.append(self.decoder.logits(h[-1:]))
        return np.concatenate(rows) if every else rows[0][0]

    def forward_in_pieces(self, token_ids: ArrayLike) -> Iterator[Float32Array]:
        """As ``forward`` with ``every``, in pieces of ``plan.logit_rows`` tokens, for which the
        budget has room: yields logits (rows, vocab_size) float32."""
        with self.turns.alone(), np.errstate(over="ignore", invalid="ignore"):
            ids, chunk = self.checked(token_ids), self.plan.chunk
            h = np.concatenate(
                [self._hidden(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
            )
        for first in range(0, len(h), self.plan.logit_rows):
            with self.turns.alone(), np.errstate(over="ignore", invalid="ignore"):
                logits = self.decoder.logits(h[first : first + self.plan.logit_rows])
            yield logits

    def checked(self, token_ids: ArrayLike) -> Int64Array:
        """Token ids (T,) that can be processed next. Raises UserError where they cannot."""
        ids, context = self._checked_ids(token_ids), self.plan.context
        if self.position + len(ids) > context:
            raise UserError(
                f"{self.position + len(ids)} tokens do not fit the context of {context}"
            )
        return ids

    def _checked_ids(self, token_ids: ArrayLike) -> Int64Array:
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise UserError("token ids must be a list of one or more whole numbers")
        vocabulary = self.config.vocab_size
        strange = ids[(ids < 0) | (ids >= vocabulary)]
        if strange.size:
            raise UserError(f"token id {strange[0]} is not within 0 to {vocabulary - 1}")
        return ids.astype(np.int64)

    def _hidden(
        self, ids: Int64Array, begun: float = 0.0, share: float = 1.0, sure: int | None = None
    ) -> Float32Array:
        """The next tokens of the text, ids (T,) -> hidden states after the last layer (T, d_model).

        They are ``share`` of a prompt of which the share ``begun`` is done; or the first ``sure``
        of them belong to the text and the others are drafts, until ``Passes.settle``.
        """

        def progress(done: float) -> None:
            if sure is None and len(ids) > 1:
                self.progress("prompt", begun + share * done, 1.0)

        return self.passes([Part(self.text, ids)], sure, progress)

    # ------------------------------------------------------------------ using

    @property
    def layers(self) -> list[Layer]:
        """The model's layers."""
        return self.decoder.layers

    @property
    def ids(self) -> list[int]:
        """The tokens in the key/value cache."""
        return self.text.ids

    @property
    def token(self) -> int:
        """How many tokens were ever processed; the neuron caches count by these."""
        return self.passes.token

    @property
    def position(self) -> int:
        """How many tokens are in the key/value cache."""
        return self.text.position

    def reset(self, kept: int = 0) -> None:
        """Forget the tokens but for the first ``kept``. The neuron cache stays as it is: it
        changes no result. Raises UserError where there are not so many."""
        with self.turns.alone():
            if not 0 <= kept <= self.position:
                raise UserError(f"{kept} of {self.position} tokens cannot be kept")
            del self.ids[kept:]

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
        with self.turns.alone(self.turns.begun):
            ids = list(self.ids if token_ids is None else token_ids)
            if ids:
                self._checked_ids(ids)
            if len(ids) > self.config.max_position_embeddings + 1:
                raise UserError(f"{len(ids)} tokens are more than the model's positions")
            kept = self.text.in_common(ids)
            # Layers whose window has moved past this text compute it again when it goes on.
            kept = kept if self.text.holds(kept) else 0
            save(path, self._setting(), self.text.caches, Session(ids, kept, list(messages)))

    def load_session(self, path: Path | str) -> Session:
        """Read a session into the key/value cache, in place of what it holds; returns it.

        ``generate(session.token_ids, reuse=True)`` goes on with it, with the bits that it would
        have had without the stop. Raises UserError where another option would be right, and
        FormatError where the file is of another model, cut or changed: the context is empty then,
        or as it was.
        """
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

    def logits(self, token_ids: ArrayLike) -> Float32Array:
        """token_ids (T,) from an empty context -> (T, vocab_size) float32, one row a token.

        The array returned is yours, and not part of the memory budget.
        """
        with self.turns.alone():
            del self.ids[:]
            return self._forward(token_ids, every=True)

    def trace(self, token_ids: ArrayLike, tap: TraceTap, progress: Progress = no_progress) -> None:
        """Process token_ids (T,) from an empty context and tell ``tap`` every intermediate value,
        in the order in which they are computed: see transformer/values.py.

        tap  is called as tap(layer, first, **values): of ``layer``, or of the whole model where it
             is None, the values of the tokens first, first + 1, ...; what it is given is valid
             during the call
        progress  is told the tokens done, as "trace"
        """
        with self.turns.alone(), np.errstate(over="ignore", invalid="ignore"):
            del self.ids[:]
            ids = self.checked(token_ids)
            at_once = max(1, min(self.plan.chunk, TRACED_BYTES // (4 * widest(self.config))))
            for first in range(0, len(ids), at_once):
                with self._tapped(tap, first):
                    h = self._hidden(ids[first : first + at_once])
                for row in range(0, len(h), self.plan.logit_rows):
                    with self._tapped(tap, first + row):
                        self.decoder.logits(h[row : row + self.plan.logit_rows])
                progress("trace", first + len(h), len(ids))

    @contextmanager
    def _tapped(self, tap: TraceTap, first: int) -> Iterator[None]:
        """``tap`` is told what is computed, of tokens from ``first`` on, while the block runs."""
        try:
            self.decoder.set_tap(tap, first)
            yield
        finally:
            self.decoder.set_tap(None)

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

    def _new_stats(self) -> Stats:
        in_force = self.plan.mode == "predicted" and self.bundle.calibration
        sparsity = in_force.sparsity if in_force else None
        return Stats(self.plan, self.expected, sparsity=sparsity)

    def _checked_prompt(self, token_ids: Iterable[int], max_new_tokens: int) -> list[int]:
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

    @property
    def closed(self) -> bool:
        return self.flash.fd < 0

    def close(self) -> None:
        """Close the file, once no other thread computes. The model cannot be used any more."""
        with self.turns.lock:
            self.turns.refuse_within()
            self.bundle.close()
            self.flash.close()
            self.drafts.close()
            if self.kv_file is not None:
                self.kv_file.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
