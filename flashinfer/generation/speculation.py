"""Speculative decoding: tokens are drafted, one pass checks them, and those stay that the model
would have chosen itself.

A token is drawn from the model's own logits with the sampler's next random number, whether it was
drafted or not; a draft is accepted where it equals the draw. As the number of tokens in a pass
changes no bit of a logit, the text is the same with any drafts and with none. (Leviathan et al.
2023 accept at random instead, and keep the distribution but not the text.)
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from flashinfer.formats.arrays import Float32Array
from flashinfer.generation.drafts import Draft, Drafter
from flashinfer.generation.pace import Pace
from flashinfer.generation.sampling import Sampler


def drawn(
    sampler: Sampler, rows: Float32Array, draft: Sequence[int], ends: Collection[int]
) -> list[int]:
    """The tokens that a pass gives: one more than those of the draft that were right.

    rows  (1 + drafted, vocab_size): the logits after the text's last token, and after each drafted
          one; a token of ``ends`` is the last
    """
    tokens = []
    for number in range(len(rows)):
        tokens.append(sampler(rows[number]))
        if tokens[-1] in ends or number == len(draft) or tokens[-1] != draft[number]:
            break
    return tokens


@dataclass
class Drafted:
    """Sums over the passes of a generation; the drafted tokens, and those that were accepted."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0


class Drafting:
    """The drafts of one generation: what is drafted, and what came of it.

    drafter  where drafts come from, or None; sampler: draws the tokens
    pace     a Pace, which chooses how much is drafted; counts: a Drafted, which is added to
    """

    def __init__(
        self, drafter: Drafter | None, sampler: Sampler, pace: Pace, counts: Drafted
    ) -> None:
        self.drafter, self.sampler, self.pace, self.counts = drafter, sampler, pace, counts
        self.found: Draft | None = None
        self.seconds = 0.0  # of the last draft

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """The tokens to check behind the text ``ids``, at most ``most``, or none."""
        self.found, self.seconds = None, 0.0
        if self.drafter is None or most < 1 or not self.pace.may_draft:
            return []
        begun = time.perf_counter()
        self.found = self.drafter.draft(ids, most, self.sampler)
        n = self.pace.drafted(self.found, self.drafter.seconds) if self.found else 0
        tokens = self.found.tokens(n) if self.found and n else []
        self.seconds = time.perf_counter() - begun
        return tokens

    def learn(self, drafted: int, yielded: int, seconds: float) -> None:
        """The pass that checked the last draft took so long, and gave so many tokens."""
        self.pace.took(1 + drafted, yielded, seconds, self.seconds)
        self.counts.passes += 1
        self.counts.drafted += drafted
        self.counts.accepted += yielded - 1
        if self.found and drafted:
            self.pace.learn(self.found, drafted, yielded - 1)
