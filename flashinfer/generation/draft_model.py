"""Drafts by a smaller model with the same vocabulary (Leviathan et al. 2023)."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from numpy.typing import ArrayLike

from flashinfer.formats.arrays import Float32Array
from flashinfer.generation.drafts import Draft
from flashinfer.generation.sampling import Sampler
from flashinfer.transformer.text import in_common

EXPECTED = 0.6  # of its tokens are right, before it was measured
FADING = 0.9  # of what drafting took before, at each draft


class SmallModel(Protocol):
    """The part of a Model that drafts."""

    @property
    def ids(self) -> list[int]: ...

    def reset(self, kept: int = 0) -> None: ...

    def forward(self, token_ids: ArrayLike) -> Float32Array: ...

    def close(self) -> None: ...


class DraftModel:
    """Lets a small model write what the large one will probably write.

    It draws with the random numbers that the large one's sampler will draw with next, so that where
    the two agree about a token's probability they draw the same one.

    context  tokens that the small model has room for; seconds_each: of a token, as expected
    """

    name = "model"

    def __init__(self, model: SmallModel, context: int, seconds_each: float) -> None:
        self.model, self.context = model, context
        self.spent, self.drafted = seconds_each, 1.0

    def seconds(self, tokens: int) -> float:
        """What drafting so many tokens takes, by what it took lately."""
        return tokens * self.spent / self.drafted

    def draft(self, ids: Sequence[int], most: int, sampler: Sampler) -> Draft | None:
        """The Draft of up to ``most`` tokens; see Drafter."""
        most = min(most, self.context - len(ids))
        if most < 1:
            return None
        return Draft(most, self.name, EXPECTED, partial(self._written, ids, sampler))

    def _written(self, ids: Sequence[int], sampler: Sampler, n: int) -> list[int]:
        begun, ahead = time.perf_counter(), sampler.copy()
        # The last token must be processed, for its logits.
        self.model.reset(in_common(self.model.ids, ids[:-1]))
        logits = self.model.forward(ids[len(self.model.ids) :])
        tokens = [ahead(logits)]
        while len(tokens) < n:
            tokens.append(ahead(self.model.forward(tokens[-1:])))
        self.spent = FADING * self.spent + time.perf_counter() - begun
        self.drafted = FADING * self.drafted + n
        return tokens

    def close(self) -> None:
        """Close the small model."""
        self.model.close()
