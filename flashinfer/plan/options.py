"""What can be asked for when a model is opened."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError
from flashinfer.formats.layers.ffn import FFNConfig
from flashinfer.formats.tensors import ATTENTION
from flashinfer.kernels.doors import MOST_THREADS
from flashinfer.paper.neuron_cache import POLICIES, Policy, default_policy
from flashinfer.paper.open_file import IO, Engine
from flashinfer.plan import memory
from flashinfer.plan.profile import Profile
from flashinfer.plan.threads import threads_to_use
from flashinfer.transformer.kv_cache import KV_DTYPES, KVDtype
from flashinfer.transformer.text import MOST_IN_PASS

Mode = Literal["predicted", "dense", "routed"]
MODES: tuple[Mode, ...] = ("predicted", "dense")  # to ask for; a mixture of experts is routed
DRAFTS = ("auto", "off", "ngram")
MOST_TEXTS = MOST_IN_PASS  # a pass has a token of each at least, which may be all of one text
USUAL_CONTEXT = 1024  # tokens, where none is asked for and the model has as many


@dataclass(frozen=True)
class Options:
    """What ``Model.open`` can be asked for; None leaves the choice to the engine.

    memory   budget of the whole process: bytes, "600M"; None: what the machine has free
    window   keep the neurons of the last ``window`` tokens; None: as many as fit
    neurons  the mode: "predicted" or "dense"; None: predicted where the bundle has predictors. Of a
             mixture only the experts that its router chooses, always
    context  tokens that the key/value cache holds; None: the model's most, up to USUAL_CONTEXT
    kv_dtype the number format of keys and values: "f32", "f16" or "q8_0"; None: f32 where the
             attention's weights are, else f16
    threads  to compute with, at most a few for each CPU; None: one for each core this process
             may use
    io       how to read: "auto", "io_uring", "threads" or "buffered", see flash.Flash
    cache    which neurons stay: "frecency", "lru" or "window", see neuron_cache.POLICIES;
             None: "window" where ``window`` is given, else "frecency"
    device   what the flash can do: a Profile, a file that ``flashinfer probe -o`` wrote, or a
             board's name; None: what ``flashinfer probe`` measured, if it did
    warm     begin with the experts in the cache that calibration found used most; None: where
             nine tenths of them will probably be used soon
    logit_rows  tokens whose logits the budget has room for at a time
    draft    where the tokens come from that are drafted, and several checked in one pass, where
             that is faster: "ngram": from the text itself, which is what "auto" does; "off": none;
             or a file: a store that ``flashinfer surrogate`` made, or a smaller model with the same
             tokenizer, which shares the budget
    scratch  the folder of a file for keys and values that do not fit the budget; None: that of the
             model
    texts    that can share a pass, each with a context of its own: see ``Model.generate_many``
    fewer    texts may share a pass where the memory has no room for all, or the keys and values of
             all would cost more tokens a second than they bring
    """

    memory: int | str | None = None
    window: int | None = None
    neurons: Mode | None = None
    context: int | None = None
    kv_dtype: KVDtype | None = None
    threads: int | None = None
    io: Engine = "auto"
    cache: Policy | None = None
    device: Profile | Path | str | None = None
    warm: bool | None = None
    logit_rows: int = 1
    draft: Path | str = "auto"
    scratch: Path | str | None = None
    texts: int = 1
    fewer: bool = False

    def scratch_of(self, bundle: Bundle) -> Path | None:
        """The folder for keys and values; None where the model's is asked for, and cannot be
        written. Raises UserError where another is, and cannot."""
        folder = bundle.path.parent if self.scratch is None else Path(self.scratch)
        if folder.is_dir() and os.access(folder, os.W_OK):
            return folder
        if self.scratch is not None:
            raise UserError(f"--scratch {folder}: is no folder that can be written")
        return None

    @property
    def draft_file(self) -> Path | None:
        """The file that drafts come from, or None. Raises UserError where it is missing."""
        if self.draft in DRAFTS:
            return None
        if not Path(self.draft).exists():
            raise UserError(
                f"draft {str(self.draft)!r} is no file and not one of {', '.join(DRAFTS)}"
            )
        return Path(self.draft)

    def tokens_of(self, bundle: Bundle) -> int:
        """Tokens that a text has room for."""
        return self.context or min(bundle.config.max_position_embeddings, USUAL_CONTEXT)

    def decided(self, bundle: Bundle) -> "Decided":
        """What a bundle is run with. Raises UserError where an option is not one for it."""
        self._check(bundle)
        config = bundle.config
        exact = config.sparse or not bundle.has_predictors  # thresholds must be asked for
        mode = self.neurons or ("predicted" if bundle.has_predictors and exact else "dense")
        budget = self.memory
        return Decided(
            budget=memory.default_budget() if budget is None else memory.parse_size(budget),
            mode="routed" if config.reads_experts else mode,
            context=self.tokens_of(bundle),
            kv_dtype=self.kv_dtype or usual_kv_dtype(bundle),
            threads=threads_to_use(self.threads),
            policy=self.cache or default_policy(self.window),
            window=self.window,
            logit_rows=self.logit_rows,
            drafting=self.draft != "off" and self.texts == 1 and not config.encoder,
            texts=1 if self.fewer else self.texts,
        )

    def _check(self, bundle: Bundle) -> None:
        most, sparse = bundle.config.max_position_embeddings, bundle.config.sparse
        if self.neurons not in (None, *MODES):
            raise UserError(f"neurons {self.neurons!r} is not one of {', '.join(MODES)}")
        if self.io not in IO:
            raise UserError(f"io {self.io!r} is not one of {', '.join(IO)}")
        if self.cache not in (None, *POLICIES):
            raise UserError(f"cache {self.cache!r} is not one of {', '.join(POLICIES)}")
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise UserError(f"kv_dtype {self.kv_dtype!r} is not one of {', '.join(KV_DTYPES)}")
        if self.neurons == "predicted" and bundle.config.mixture and not sparse:
            raise UserError(
                f"{bundle.path}: the router of a mixture of experts knows what to use, nothing is "
                "predicted; leave --neurons away"
            )
        if self.neurons == "predicted" and not bundle.has_predictors:
            made = "make them with flashinfer calibrate, or use --neurons dense"
            if bundle.config.needs_all:
                made = "its feed-forward networks are always used whole; use --neurons dense"
            raise UserError(f"{bundle.path}: has no predictors; {made}")
        if self.window is not None and self.window < 1:
            raise UserError(f"window {self.window} is not 1 token or more")
        if self.context is not None and not 1 <= self.context <= most:
            raise UserError(f"context {self.context} is not within the model's 1 to {most} tokens")
        if self.texts > 1:
            bundle.config.refuse_encoder(bundle.path)
        if not 1 <= self.texts <= MOST_TEXTS:
            raise UserError(f"texts {self.texts} is not within 1 to {MOST_TEXTS}")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise UserError(f"threads {self.threads} is not within 1 to {MOST_THREADS}")


def usual_kv_dtype(bundle: Bundle) -> KVDtype:
    """The number format of keys and values where none is asked for: exact where the attention's
    weights are."""
    weights = (bundle.tensors[spec.name] for spec in bundle.specs if spec.role == ATTENTION)
    return "f32" if all(tensor.format.name == "f32" for tensor in weights) else "f16"


@dataclass(frozen=True)
class Decided:
    """What a plan is made for: Options of which nothing is left to choose.

    budget   bytes of the whole process; mode: "predicted", "dense" or "routed"
    context  tokens that the key/value cache holds, in the number format ``kv_dtype``
    threads  that compute
    policy   which unit makes room, see neuron_cache.POLICIES
    window   tokens that a unit stays unused; None: as many as the plan affords
    logit_rows  tokens whose logits are there at a time
    experts_first  of a mixture the experts that one token needs have memory before attention has
    fewest_reads  slots of neurons are shared by the reads that they save alone; else each layer has
             what one token needs first, which then needs no second wave
    drafting  tokens are drafted where that is faster
    kv_share  of the layers whose keys and values can lie on flash, how many do
    texts    that share a pass, each with a context of its own
    """

    budget: int
    mode: Mode
    context: int
    kv_dtype: KVDtype
    threads: int
    policy: Policy
    window: int | None
    logit_rows: int = 1
    experts_first: bool = False
    fewest_reads: bool = False
    drafting: bool = False
    kv_share: float = 0.0
    texts: int = 1

    def chooses(self, ffn: FFNConfig) -> bool:
        """Whether a predictor or a router chooses a layer's units; else all of them are used."""
        return ffn.neurons > 0 and (self.mode == "predicted" or ffn.reads_experts)
