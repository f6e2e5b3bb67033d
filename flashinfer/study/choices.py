"""Multiple choice: which of several endings a model finds likeliest.

A question is a line of JSON, in the form of HellaSwag or of ARC, and becomes a text as in
lm-evaluation-harness. The score of a choice is the sum of its tokens' log-likelihoods behind the
context; the normalised one is that sum over its bytes.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.formats import bounded_json
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.files import read_text
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.generation.sampling import refuse_infinite
from flashinfer.model import Model
from flashinfer.study.divergence import standard_error
from flashinfer.study.perplexity import log_softmax

MOST_CHOICES = 64  # of a question


@dataclass(frozen=True)
class Question:
    """What is read before a choice, the choices without the space before them, and which is right.

    where  the file and line, for messages
    """

    context: str
    choices: list[str]
    label: int
    where: str


@dataclass(frozen=True)
class Tokens:
    """A Question in tokens: of each choice those of context and choice, how many at the end are the
    choice's, and its bytes."""

    ids: list[list[int]]
    own: list[int]
    nbytes: list[int]
    label: int


@dataclass(frozen=True)
class Accuracy:
    """Shares of ``questions`` whose right choice has the highest score, and standard errors, None
    of a single question; normalised: scores over the choice's bytes."""

    questions: int
    accuracy: float
    accuracy_error: float | None
    normalised: float
    normalised_error: float | None


def read_questions(path: Path | str) -> list[Question]:
    """The Questions of a file, one JSON object a line. Raises FormatError, naming file and line."""
    questions = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            questions.append(_question(line, f"{path}: line {number}"))
    if not questions:
        raise FormatError(f"{path}: has no questions, one JSON object a line")
    return questions


def _question(line: str, where: str) -> Question:
    found = bounded_json.parse(line, where)
    if not isinstance(found, dict):
        raise FormatError(f"{where}: is not a JSON object")
    try:
        context, choices, label = _hellaswag(found) if "endings" in found else _arc(found)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FormatError(
            f"{where}: is not a question: there have to be ctx, endings and label, or question, "
            "choices and answerKey"
        ) from None
    if not 2 <= len(choices) <= MOST_CHOICES or not all(choices):
        raise FormatError(f"{where}: a question has 2 to {MOST_CHOICES} choices, and none is empty")
    if not 0 <= label < len(choices):
        raise FormatError(f"{where}: the label is not one of the {len(choices)} choices")
    return Question(context, choices, label, where)


def _hellaswag(found: dict[str, Any]) -> tuple[str, list[str], int]:
    if "ctx_a" in found:
        context = f"{_text(found['ctx_a'])} {_text(found.get('ctx_b', '')).capitalize()}"
    else:
        context = _text(found["ctx"])
    if "activity_label" in found:
        context = f"{_text(found['activity_label'])}: {context}"
    label = found["label"]
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise TypeError
    return _clean(context), [_clean(_text(ending)) for ending in found["endings"]], int(label)


def _clean(text: str) -> str:
    """A text of HellaSwag without WikiHow's marks."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _arc(found: dict[str, Any]) -> tuple[str, list[str], int]:
    stem = found["question"]
    if isinstance(stem, dict):  # as the Allen Institute's files have it
        stem, listed = stem["stem"], stem["choices"]
        texts, labels = [c["text"] for c in listed], [c["label"] for c in listed]
    else:
        texts, labels = found["choices"]["text"], found["choices"]["label"]
    if len(texts) != len(labels):
        raise ValueError
    return (
        f"Question: {_text(stem)}\nAnswer:",
        [_text(t) for t in texts],
        labels.index(found["answerKey"]),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # half a surrogate pair is no text: UnicodeEncodeError, a ValueError
    return value


def tokenized(
    questions: Sequence[Question],
    encode: Callable[[str], list[int]],
    most: int,
    begin: int | None,
    progress: Progress = no_progress,
) -> list[Tokens]:
    """The questions in tokens.

    encode  text -> token ids; most: tokens that the model's context may have
    begin   the token that begins a text, for a question without a context; None: there is none
    Raises UserError, naming file and line, where a question does not fit.
    """
    found = []
    for number, question in enumerate(questions):
        context = question.context.rstrip()
        ids, own = [], []
        before = encode(context) if context else [] if begin is None else [begin]
        for choice in question.choices:
            whole = encode(f"{context} {choice}") if context else before + encode(choice)
            ids.append(whole)
            own.append(len(whole) - len(before))
        if not before or min(own) < 1:
            raise UserError(f"{question.where}: the question has no context, or a choice no tokens")
        longest = max(len(whole) for whole in ids)
        if longest > most:
            raise UserError(
                f"{question.where}: the question has {longest} tokens, the model's context {most}"
            )
        nbytes = [len(choice.encode()) for choice in question.choices]
        found.append(Tokens(ids, own, nbytes, question.label))
        progress("tokenize", number + 1, len(questions))
    return found


def answer(model: Model, questions: Sequence[Tokens], progress: Progress = no_progress) -> Accuracy:
    """How many questions a model answers right. Raises UserError where logits are not finite.

    progress  is told the questions answered, as "choices"
    """
    right, normalised = [], []
    for number, question in enumerate(questions):
        scores = np.array(list(_scores(model, question)))
        right.append(int(scores.argmax()) == question.label)
        normalised.append(int((scores / question.nbytes).argmax()) == question.label)
        progress("choices", number + 1, len(questions))
    hits, its = np.array(right, dtype=np.float64), np.array(normalised, dtype=np.float64)
    return Accuracy(
        len(questions),
        float(hits.mean()),
        standard_error(hits),
        float(its.mean()),
        standard_error(its),
    )


def _scores(model: Model, question: Tokens) -> Iterator[float]:
    """Yield the log-likelihood of each choice; what all begin with is processed once."""
    model.reset()
    # The last token of a context is processed with each choice, whose first token it predicts.
    shared = min(len(ids) - own - 1 for ids, own in zip(question.ids, question.own, strict=True))
    shared = min(shared, _in_common(question.ids))
    if shared:
        model.forward(question.ids[0][:shared])
    for ids, own in zip(question.ids, question.own, strict=True):
        model.reset(shared)
        total, after = 0.0, shared
        for logits in model.forward_in_pieces(ids[shared:-1]):
            for row in logits:
                after += 1  # row predicts ids[after]
                if after >= len(ids) - own:
                    refuse_infinite(row, after - 1)
                    total += float(log_softmax(row)[ids[after]])
        yield total


def _in_common(lists: list[list[int]]) -> int:
    """How many of their first items all lists share."""
    for i, items in enumerate(zip(*lists, strict=False)):
        if len(set(items)) > 1:
            return i
    return min(map(len, lists))
