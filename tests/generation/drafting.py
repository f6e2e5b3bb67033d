"""Drafts and paces that tests choose, so that nothing depends on time."""

import numpy as np

from flashinfer.generation.drafts import Draft


class Known:
    """Drafts a known text, each token right with the probability ``share``."""

    name = "known"

    def __init__(self, text, share, seed=0, vocab_size=50):
        self.text, self.share, self.vocab_size = list(text), share, vocab_size
        self.random = np.random.default_rng(seed)

    def seconds(self, tokens):
        return 0.0

    def draft(self, ids, most, sampler):
        return Draft(most, self.name, self.share, lambda n: self.tokens(len(ids), n))

    def tokens(self, at, n):
        right = [*self.text[at : at + n], *[0] * n][:n]
        wrong = self.random.random(n) >= self.share
        return [(t + 1) % self.vocab_size if w else t for t, w in zip(right, wrong, strict=True)]


class Anyhow:
    """A pace that drafts any number of tokens."""

    may_draft = True

    def __init__(self, most, seed=0):
        self.most, self.random = most, np.random.default_rng(seed)

    def begin(self, tokens):
        self.left = tokens

    def drafted(self, draft, cost):
        return int(self.random.integers(0, min(draft.most, self.most) + 1))

    def took(self, *figures):
        pass

    learn = took


def drafting(model, drafter=None, seed=0):
    """Let a model draft from ``drafter`` any number of tokens."""
    model.pace = Anyhow(model.plan.drafts, seed)
    model.drafter = drafter or model.drafter
    return model
