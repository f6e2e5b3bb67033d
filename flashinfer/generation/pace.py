"""How many tokens to draft: as many as make a token cheapest, by what passes take and drafts are
worth, and none where that is none."""

import statistics
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from flashinfer.generation.drafts import Draft

SIZES = (1, 2, 4, 8, 12, 16, 24, 32)  # tokens of a pass
SAMPLES = 7  # of the seconds of passes of one size, of which the median counts
FEW = 3  # from so many on
UNKNOWN = 0.02  # of a pass's seconds that each further token takes, where nothing is known
LEAST_GAIN = 1.01  # less is not worth a draft
MOST_LOST = 0.02  # of all seconds may be lost by drafts that are wrong
AHEAD = 100  # tokens that a text is trusted to have still, where it may
# Passes after which one without drafts is timed again: where the gain is at least CLEAR, and below.
CHECKED, SOONER = 48, 8
CLEAR = 1.5
FADING = 0.97  # of what was found of drafts, a step later
TRUST = 3.0  # tokens that what is expected of a kind of drafts counts for


class PassTimes:
    """Seconds of a pass by its tokens: what is expected, corrected by what passes took."""

    def __init__(self, expected: Callable[[int], float] | None) -> None:
        self.expected = expected or (lambda tokens: 1 + UNKNOWN * (tokens - 1))
        self.prior: dict[int, float] = {}  # {tokens: seconds expected}
        self.samples: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=SAMPLES))
        self.measured: dict[int, float] = {}  # {tokens: their median}

    def took(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long."""
        samples = self.samples[tokens]
        samples.append(seconds)
        # Of a few samples the one that speaks against drafts.
        few = min if tokens == 1 else max
        self.measured[tokens] = (statistics.median if len(samples) >= FEW else few)(samples)

    def __call__(self, tokens: int) -> float:
        """Seconds of a pass of so many tokens: by those measured, or what is expected times what
        the nearest size that was measured took of what was expected of it."""
        if tokens in self.measured:
            return self.measured[tokens]
        if not self.measured:
            return self._expected(tokens)
        nearest = min(self.measured, key=lambda size: abs(size - tokens))
        return self._expected(tokens) * self.measured[nearest] / self._expected(nearest)

    def _expected(self, tokens: int) -> float:
        if tokens not in self.prior:
            self.prior[tokens] = self.expected(tokens)
        return self.prior[tokens]


@dataclass
class Acceptance:
    """How often drafted tokens of one kind are right: of those ``tried`` so many, both faded."""

    expected: float
    right: float = 0.0
    tried: float = 0.0

    def learn(self, drafted: int, accepted: int) -> None:
        """Of so many drafted tokens the first ``accepted`` were right; those behind the first
        wrong one say nothing."""
        self.right += accepted
        self.tried += min(drafted, accepted + 1)

    def fade(self) -> None:
        self.right *= FADING
        self.tried *= FADING

    @property
    def share(self) -> float:
        return (self.right + TRUST * self.expected) / (self.tried + TRUST)


def tokens_expected(share: float, drafted: int) -> float:
    """Tokens that a pass yields where each drafted one is right with the probability ``share``."""
    if share >= 1:
        return drafted + 1.0
    return (1 - share ** (drafted + 1)) / (1 - share)


class Pace:
    """Chooses how much of a draft is worth checking, and learns from each pass.

    expected  a function tokens -> seconds of a pass, see plan.cost; None: nothing is known
    most      tokens of a draft
    """

    def __init__(self, expected: Callable[[int], float] | None, most: int) -> None:
        self.times, self.most = PassTimes(expected), most
        self.kinds: dict[str, Acceptance] = {}
        self.seconds = self.lost = 0.0  # in all, and more than the same tokens one by one
        self.since = 0  # passes since one without drafts
        self.left = 0  # tokens still to come of this text

    def begin(self, tokens: int) -> None:
        """A text of at most so many tokens begins."""
        self.left = tokens

    def drafted(self, draft: Draft, cost: Callable[[int], float]) -> int:
        """How many tokens of a draft to check; cost: a function tokens -> seconds of drafting."""
        most = min(draft.most, self.most)
        if most < 1 or not self.may_draft:
            return 0
        share, may_lose = self._acceptance(draft).share, self._may_lose
        one, best, drafts = self.times(1), LEAST_GAIN, 0
        for tokens in self._sizes(most):
            n = tokens - 1
            seconds = self.times(tokens) + cost(n)
            gain = tokens_expected(share, n) * one / seconds
            if gain > best and seconds - one <= may_lose:  # even if all of them were wrong
                best, drafts = gain, n
        if self.since >= (CHECKED if best >= CLEAR else SOONER):
            return 0
        return drafts

    @property
    def may_draft(self) -> bool:
        """Whether even the smallest draft could be afforded, were it wrong."""
        one = self.times.measured.get(1)
        return one is not None and self.most > 0 and self.times(2) - one <= self._may_lose

    @property
    def _may_lose(self) -> float:
        """Seconds that drafts may still lose: a share of what texts took, and will take soon."""
        soon = min(self.left, AHEAD) * self.times(1)
        return MOST_LOST * (self.seconds + soon) - self.lost

    def _sizes(self, most: int) -> list[int]:
        """The sizes of passes to choose from, where at most so many tokens are drafted."""
        sizes = [size for size in SIZES[1:] if size - 1 <= most]
        return sizes or [most + 1]

    def _acceptance(self, draft: Draft) -> Acceptance:
        return self.kinds.setdefault(draft.kind, Acceptance(draft.expected))

    def took(self, tokens: int, yielded: int, seconds: float, drafting: float) -> None:
        """A pass of so many tokens took so long, drafting them besides, and gave ``yielded``."""
        self.times.took(tokens, seconds)
        self.left -= yielded
        self.seconds += seconds + drafting
        self.lost += drafting
        if tokens > 1:
            self.lost += seconds - yielded * self.times(1)
        self.since = self.since + 1 if tokens > 1 else 0

    def learn(self, draft: Draft, drafted: int, accepted: int) -> None:
        """Of so many tokens of a draft the first ``accepted`` were right."""
        for kind in self.kinds.values():
            kind.fade()
        self._acceptance(draft).learn(drafted, accepted)
