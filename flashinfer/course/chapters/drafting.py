"""Chapter 8: a drafted pass."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import flashinfer.model
from flashinfer.course.engine import opened, text
from flashinfer.course.lesson import Answer, Grade, in_place_of, shown
from flashinfer.formats.arrays import Float32Array
from flashinfer.generation.drafts import Draft
from flashinfer.generation.sampling import Sampler
from flashinfer.generation.speculation import drawn

TITLE = "a drafted pass"
ENGINE = "flashinfer/generation/speculation.py: drawn"
PROMPT, TOKENS, DRAFTED = 64, 96, 4


def accept(
    choose: Callable[[Float32Array], int], rows: Float32Array, draft: Sequence[int]
) -> list[int]:
    """Say which tokens a pass gives that has checked a draft.

    choose  a function: the model's next token from its logits. It draws from random numbers, so
            that each call counts: it is called once for each token that the text gets, in order
    rows    (1 + len(draft), vocab_size): the logits after the text's last token, and after each
            drafted one, as if all drafted tokens before it belonged to the text
    draft   tokens that were guessed to come next
    Returns the tokens that come next, at least one: those that the model would have written
    without any draft.
    """
    return drawn(choose, rows, draft, ())  # type: ignore[arg-type]


solution = accept


class Chooser:
    """The model's choice of a token, and the rows that it was asked about."""

    def __init__(self, sampler: Callable[[Float32Array], int], rows: Float32Array) -> None:
        self.sampler, self.rows = sampler, rows
        self.asked: list[int] = []

    def __call__(self, row: Any) -> int:
        same = [i for i, known in enumerate(self.rows) if np.array_equal(known, row)]
        self.asked.append(min(same, key=lambda i: abs(i - len(self.asked)), default=-1))
        return self.sampler(np.asarray(row))


def examples(answer: Answer) -> None:
    """Drafts of which none, some or all tokens are right."""
    random = np.random.default_rng(0)
    for number in range(80):
        n = int(random.integers(0, 5))
        rows = random.random((n + 1, 6)).astype(np.float32)
        right = rows.argmax(axis=1).tolist()
        draft = [t if random.random() < 0.7 else (t + 1) % 6 for t in right[:n]]
        sampler = Sampler(0.7 if number % 3 else 0.0, 0, 1.0, number)
        judged(answer, sampler, sampler.copy(), rows, draft)


def judged(
    answer: Answer,
    sampler: Callable[[Float32Array], int],
    same: Callable[[Float32Array], int],
    rows: Float32Array,
    draft: Sequence[int],
) -> list[int]:
    """The tokens that the answer gives. Raises Wrong where they are not those that the model would
    have written.

    same  a sampler with the same random numbers
    """
    chooser = Chooser(sampler, rows)
    given = answer(chooser, rows.copy(), list(draft))
    if not isinstance(given, (list, tuple, np.ndarray)):
        raise answer.wrong(f"gave {shown(given)}; a list of tokens is wanted")
    tokens = answer.array(np.array(given), np.int64, "what is given").tolist()
    expected = accept(same, rows, draft)
    case = f"of the draft {list(draft)}, of which {_right(expected, draft)} are right: "
    if chooser.asked != list(range(len(expected))):
        raise answer.wrong(
            f"{case}choose was asked about the rows {chooser.asked}; it must be asked about "
            f"{list(range(len(expected)))}, for each token that comes next, and no more"
        )
    if tokens != expected:
        raise answer.wrong(f"{case}gave {tokens}; the model writes {expected}")
    return expected


def _right(expected: Sequence[int], draft: Sequence[int]) -> int:
    """How many tokens of the draft are right."""
    return sum(a == b for a, b in zip(expected, draft, strict=False))


class Always:
    """A pace that checks whole drafts of DRAFTED tokens, whatever they bring."""

    may_draft = True

    def begin(self, tokens: int) -> None:
        """A text of so many tokens begins."""

    def drafted(self, draft: Draft, cost: Callable[[int], float]) -> int:
        """How many tokens of a draft to check."""
        return min(draft.most, DRAFTED)

    def took(self, tokens: int, yielded: int, seconds: float, drafting: float) -> None:
        """What a pass took does not matter."""

    def learn(self, draft: Draft, drafted: int, accepted: int) -> None:
        """What a draft brought does not matter."""


def grades(answer: Answer, progress: Callable[[float], None]) -> list[Grade]:
    """The demo model, which writes with drafts from its own text, greedily and by chance."""

    def ours(sampler: Sampler, rows: Float32Array, draft: Sequence[int], ends: Any) -> list[int]:
        return judged(answer, sampler, sampler.copy(), rows, draft)

    prompt = text(tokens=PROMPT)
    without = _write(prompt, "off")
    own = _write(prompt, "ngram")
    with in_place_of(flashinfer.model, "drawn", ours):
        got = _write(prompt, "ngram", progress)
    return [
        Grade("the text, of all its tokens", got.digest, without.digest),
        Grade(f"passes for {2 * TOKENS} tokens", got.passes, own.passes, own.passes),
        Grade("bytes of units read a token", got.nbytes, own.nbytes, own.nbytes),
    ]


class Written(NamedTuple):
    """digest of two texts, passes of the model for both, bytes of units read a token."""

    digest: str
    passes: float
    nbytes: float


def _write(
    prompt: list[int], draft: str, progress: Callable[[float], None] = lambda share: None
) -> Written:
    """Continue the prompt twice, greedily and by chance."""
    digest, passes, nbytes = hashlib.sha256(), 0, 0.0
    for number, temperature in enumerate((0.0, 0.8)):
        with opened(draft=draft) as model:
            if draft != "off":
                model.pace = Always()  # type: ignore[assignment]
            written = model.generate(prompt, TOKENS, temperature, seed=0, stop_at_eos=False)
            for done, token in enumerate(written):
                digest.update(token.to_bytes(4, "little"))
                progress((number + done / TOKENS) / 2)
            passes += model.stats.drafts.passes
            nbytes += model.stats.generation.bytes_per_token / 2
    return Written(digest.hexdigest()[:16], float(passes), nbytes)
