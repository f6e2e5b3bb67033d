"""What the option ``draft`` names: a store of texts, or a smaller model in the same budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import BudgetError, UserError
from flashinfer.generation.draft_model import DraftModel
from flashinfer.generation.drafts import Draft, Drafter, NGrams
from flashinfer.generation.pace import tokens_expected
from flashinfer.generation.sampling import Sampler
from flashinfer.generation.store import Store, is_store
from flashinfer.plan import memory
from flashinfer.plan.companion import bundle_at
from flashinfer.plan.options import Options
from flashinfer.plan.plan import reserve
from flashinfer.plan.setup import Setup, prepare

ASSUMED = 0.7  # of a model's drafts are right, when the memory is divided
SIZES = (2, 4, 8, 16)  # tokens of a pass
QUARTER = 4  # at most this part of the budget is the small model's, where nothing is measured


@dataclass
class OpenedDraft:
    """A file that drafts come from, open.

    base  bytes that the process takes besides the large model; None: what it takes now
    """

    drafter: Store | DraftModel | None = None
    base: int | None = None

    def with_text(self, context: int) -> Drafter:
        """The Drafter for texts of up to ``context`` tokens: of the file and of the text itself."""
        if isinstance(self.drafter, DraftModel):
            return self.drafter
        ngrams = NGrams(context)
        return ngrams if self.drafter is None else Longer(ngrams, self.drafter)

    def close(self) -> None:
        """Close the file."""
        if self.drafter is not None:
            self.drafter.close()


class Longer:
    """Drafts from the text itself, or from a store where more of the text's end stands there."""

    name = "store"

    def __init__(self, ngrams: NGrams, store: Store) -> None:
        self.ngrams, self.store = ngrams, store

    def seconds(self, tokens: int) -> float:
        """Nothing worth counting."""
        return 0.0

    def draft(self, ids: Sequence[int], most: int, sampler: Sampler) -> Draft | None:
        """The Draft of up to ``most`` tokens; see Drafter."""
        found = [one.draft(ids, most, sampler) for one in (self.ngrams, self.store)]
        return max((one for one in found if one), key=lambda one: one.expected, default=None)


def opened_draft(
    options: Options, bundle: Bundle, open_model: Callable[[Bundle, Options], Any]
) -> OpenedDraft:
    """What ``options.draft`` names, for a Bundle that is about to be opened as a model.

    open_model  opens a Bundle as a Model
    Raises UserError where its vocabulary is another, FormatError where the file is not sound.
    """
    path, context = options.draft_file, options.tokens_of(bundle)
    if path is None:
        return OpenedDraft()
    path = bundle_at(path)
    if is_store(path):
        store = Store(path, bundle.config.vocab_size)
        _refuse_other_vocabulary(path, store.vocabulary, bundle)
        return OpenedDraft(store, memory.rss() + store.mapped_bytes)
    small = Bundle(path, memory=memory.header_room(options.memory))
    try:
        small.config.refuse_encoder(path)
        _refuse_other_vocabulary(path, small.vocabulary, bundle)
        return _opened_model(options, context, bundle, small, open_model)
    except BaseException:
        small.close()
        raise


def _refuse_other_vocabulary(path: Path | str, vocabulary: str, bundle: Bundle) -> None:
    if vocabulary != bundle.vocabulary:
        raise UserError(
            f"{path}: its token ids are not those of {bundle.path}; drafts must come from a model "
            "with the same tokenizer"
        )


def _opened_model(
    options: Options,
    context: int,
    bundle: Bundle,
    small: Bundle,
    open_model: Callable[[Bundle, Options], Any],
) -> OpenedDraft:
    """The small model, opened with the part of the budget with which both together are fastest."""
    before = memory.rss()
    own = Options(
        memory=options.memory, context=min(context, small.config.max_position_embeddings),
        threads=options.threads, io=options.io, device=options.device, draft="off",
        scratch=options.scratch,
    )  # fmt: skip
    budget = _divided(options, bundle, own, small, before)
    model = open_model(small, replace(own, memory=budget))
    expected = model.expected.total if model.expected else 0.0
    drafter = DraftModel(model, model.plan.context, expected)
    return OpenedDraft(drafter, before + model.plan.own)


def _divided(options: Options, bundle: Bundle, own: Options, small: Bundle, before: int) -> int:
    """The budget to open the small model with, as if it were alone: as much as it has a use for,
    or less where the large one has more use for it.

    before  bytes that the process takes without either
    """
    whole = _planned(small, own, before)
    least = _planned(small, replace(own, memory=1), before)
    if isinstance(whole, int):
        raise BudgetError(f"{small.path}: does not fit the budget beside {bundle.path}", whole)
    least_budget = least if isinstance(least, int) else whole.plan.budget
    full_budget = max(least_budget, before + reserve(whole.plan.budget) + whole.plan.own)
    best, budget = 0.0, None
    for share in (1.0, 0.5, 0.0):
        tried = int(least_budget + share * (full_budget - least_budget))
        small_setup = _planned(small, replace(own, memory=tried), before)
        if isinstance(small_setup, int):
            continue
        large = _planned(bundle, options, before + small_setup.plan.own)
        if isinstance(large, int):
            continue
        speed = _tokens_per_second(large, small_setup)
        if speed is None:  # nothing is measured
            if small_setup.plan.own * QUARTER <= large.plan.budget or share == 0.0:
                return tried
        elif speed > best:
            best, budget = speed, tried
    if budget is None:
        raise UserError(f"{small.path}: does not fit the budget beside {bundle.path}")
    return budget


def _planned(bundle: Bundle, options: Options, base: int) -> Setup | int:
    """The Setup of a bundle with its Flash closed; or the least budget that would do."""
    try:
        setup = prepare(bundle, options, base)
    except BudgetError as error:
        return error.least
    setup.flash.close()
    return setup


def _tokens_per_second(large: Setup, small: Setup) -> float | None:
    """What both together are expected to reach; None where nothing is measured."""
    if large.pass_seconds is None or small.expected is None:
        return None
    return max(
        tokens_expected(ASSUMED, size - 1)
        / (large.pass_seconds(size) + (size - 1) * small.expected.total)
        for size in SIZES
    )
