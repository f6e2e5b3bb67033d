"""A model opened: its weights in DRAM or on flash, and the logits of the tokens it is given."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from flashinfer import kernels
from flashinfer.assembly import fill_caches, make_decoder
from flashinfer.drafters import OpenedDraft, opened_draft
from flashinfer.formats.arrays import Float32Array, Int64Array
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.generation.pace import Pace
from flashinfer.loading import allocate_texts, key_value_file, load_weights
from flashinfer.paper.flash import aligned_bytes
from flashinfer.passes import Passes
from flashinfer.plan.options import Options
from flashinfer.plan.setup import Setup, opened, prepare
from flashinfer.stats import Stats, measured
from flashinfer.text.tokenizer import Tokenizer
from flashinfer.transformer.kv_flash import KeyValueFile
from flashinfer.transformer.layer import Layer
from flashinfer.transformer.text import Part
from flashinfer.transformer.values import TraceTap, widest
from flashinfer.turns import Turns

TRACED_BYTES = 2 << 20  # of a value that a trace may have to gather
Some = TypeVar("Some", bound="OpenedModel")


@dataclass(frozen=True)
class Encoding:
    """A text of T tokens, encoded.

    token_ids  its tokens; hidden: (T, d_model) float32, of each token
    pooled     (d_model,) float32, of the whole text; None where the model has no pooler
    logits     (T, vocab_size) float32: which token stands at each place; None where they were not
               asked for
    """

    token_ids: list[int]
    hidden: Float32Array
    pooled: Float32Array | None = None
    logits: Float32Array | None = None


class OpenedModel:
    """What a Model is before it writes. One thread, and one text, at a time.

    config    ModelConfig; plan: plan.plan.Plan; stats: what the last calls took
    tokenizer of an encoder, or why it has none that can be used; None of other models
    profile   profile.Profile of the flash, where ``flashinfer probe`` measured it, or None
    expected  cost.Cost of a token by that profile, or None
    """

    @classmethod
    def open(
        cls: type[Some],
        path: Path | str | Bundle,
        options: Options | None = None,
        progress: Progress = no_progress,
        **changes: Any,
    ) -> Some:
        """Open a bundle, by its path or opened already.

        options  Options; ``changes`` name some of its fields: Model.open(path, memory="600M")
        progress called as progress("load", bytes, bytes in all) while opening, and as
                 progress("prompt", share done, 1.0) during a prompt of several tokens

        Raises FormatError where the file is not sound, BudgetError where the memory is too little,
        UserError where an option is wrong.
        """
        options = replace(options or Options(), **changes)
        bundle, drafts = opened(path, options), OpenedDraft()
        tokenizer: Tokenizer | UserError | None = None
        try:
            drafts = opened_draft(options, bundle, cls.open)
            tokenizer = _tokenizer_of_encoder(bundle, options)
            setup = prepare(bundle, options, drafts.base)
        except BaseException:
            bundle.close()
            drafts.close()
            if isinstance(tokenizer, Tokenizer):
                tokenizer.close()
            raise
        return cls(bundle, setup, progress, drafts, tokenizer)

    def __init__(
        self,
        bundle: Bundle,
        setup: Setup,
        progress: Progress,
        drafts: OpenedDraft | None = None,
        tokenizer: Tokenizer | UserError | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.bundle, self.config, self.progress = bundle, bundle.config, progress
        self.flash, self.plan = setup.flash, setup.plan
        self.profile, self.expected = setup.profile, setup.expected
        self.pace = Pace(setup.pass_seconds, self.plan.drafts)
        self.drafts = drafts or OpenedDraft()
        self.drafter = self.drafts.with_text(self.plan.context) if self.plan.drafts else None
        flash = self.flash
        # Not by way of this model, which is thus freed when nobody holds it.
        self.turns = Turns(lambda: flash.closed)
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

    def encode(self, texts: Iterable[str | ArrayLike], logits: bool = False) -> list[Encoding]:
        """Encode texts, each by itself: the hidden states of its tokens, and its pooled vector.

        texts   strings, tokenized with the tokens that begin and end every text; or token ids (T,)
        logits  of each token's place, too, where the model has a head of masked tokens

        The arrays returned are yours, and not part of the memory budget. Raises UserError where the
        model is no encoder, a text is empty, has more tokens than the context, or is a string and
        the model has no tokenizer.
        """
        config, name = self.config, self.bundle.path
        if not config.encoder:
            raise UserError(
                f"{name}: is no encoder; flashinfer run and Model.generate let it write"
            )
        if logits and not config.has_head:
            raise UserError(f"{name}: has no head of masked tokens, and so no logits")
        if isinstance(texts, (str, bytes)):
            raise UserError("texts are a list of strings or of token ids, not one string")
        self.stats = self._new_stats()
        return [self._encoded(self._ids_of(text), logits) for text in texts]

    def _ids_of(self, text: str | ArrayLike) -> Int64Array:
        """A text's token ids (T,), which the context holds. Raises UserError."""
        ids = self._valid_ids(self._tokenized(text) if isinstance(text, str) else text)
        if len(ids) > self.plan.context:
            raise UserError(
                f"a text of {len(ids)} tokens does not fit the context of {self.plan.context}; the "
                f"model's most is {self.config.max_position_embeddings}"
            )
        return ids

    def _tokenized(self, text: str) -> list[int]:
        if not isinstance(self.tokenizer, Tokenizer):
            raise UserError(str(self.tokenizer))
        return self.tokenizer.encode(text)

    def _encoded(self, ids: Int64Array, logits: bool) -> Encoding:
        with self.turns.alone(), np.errstate(over="ignore", invalid="ignore"):
            del self.ids[:]
            with measured(self.stats.prompt, len(ids), self.passes.counters):
                h = self._hidden(ids)
            pooled = None if self.decoder.pooler is None else self.decoder.pooler(h)
            rows = self.decoder.logits(h) if logits else None
        return Encoding(ids.tolist(), h, pooled, rows)

    def checked(self, token_ids: ArrayLike) -> Int64Array:
        """Token ids (T,) that can be processed next. Raises UserError where they cannot."""
        ids, context = self._checked_ids(token_ids), self.plan.context
        if self.position + len(ids) > context:
            raise UserError(
                f"{self.position + len(ids)} tokens do not fit the context of {context}"
            )
        return ids

    def _checked_ids(self, token_ids: ArrayLike) -> Int64Array:
        self.config.refuse_encoder(self.bundle.path)
        return self._valid_ids(token_ids)

    def _valid_ids(self, token_ids: ArrayLike) -> Int64Array:
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

    def _new_stats(self) -> Stats:
        in_force = self.plan.mode == "predicted" and self.bundle.calibration
        sparsity = in_force.sparsity if in_force else None
        return Stats(self.plan, self.expected, sparsity=sparsity)

    @property
    def closed(self) -> bool:
        return self.flash.closed

    def close(self) -> None:
        """Close the file, once no other thread computes. The model cannot be used any more."""
        with self.turns.lock:
            self.turns.refuse_within()
            self.bundle.close()
            self.flash.close()
            self.drafts.close()
            if self.kv_file is not None:
                self.kv_file.close()
            if isinstance(self.tokenizer, Tokenizer):
                self.tokenizer.close()

    def __enter__(self: Some) -> Some:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _tokenizer_of_encoder(bundle: Bundle, options: Options) -> Tokenizer | UserError | None:
    """The tokenizer of an encoder, whose process stays beside the model and has its memory set
    aside; or why there is none that can be used, as token ids do without; None of other models."""
    if not bundle.config.encoder:
        return None
    try:
        tokenizer = Tokenizer(bundle, options.memory)
    except UserError as error:
        return error
    tokenizer.stay(options.tokens_of(bundle))
    return tokenizer
