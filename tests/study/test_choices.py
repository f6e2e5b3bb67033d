"""Multiple choice: scores from whole logits, both benchmarks' forms, and lines that are none."""

import json
import string

import numpy as np
import pytest

from flashinfer import Model, UserError
from flashinfer.study.choices import Question, answer, read_questions, tokenized

# One token for each letter or other sign.
SIGNS = {sign: 3 + i for i, sign in enumerate(f"{string.ascii_letters} .:?\n")}


def encode(text):
    return [SIGNS[sign] for sign in text]


def lines(path, *found):
    path.write_text("".join(json.dumps(line) + "\n" for line in found))
    return path


HELLASWAG = {
    "ind": 4, "activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "unused",
    "endings": ["is here [step] now.", "sings."], "label": "1",
}  # fmt: skip
PLAIN = {"ctx": "A man", "endings": ["sits", "stands"], "label": 0}
ARC = {"question": "Why?", "choices": {"text": ["x", "yy"], "label": ["A", "B"]}, "answerKey": "B"}
ALLEN = {
    "question": {
        "stem": "Why?", "choices": [{"text": "x", "label": "1"}, {"text": "yy", "label": "2"}],
    },
    "answerKey": "1",
}  # fmt: skip


def test_the_forms_of_both_benchmarks(tmp_path):
    found = read_questions(lines(tmp_path / "x.jsonl", HELLASWAG, PLAIN, ARC, ALLEN))
    assert [(q.context, q.choices, q.label) for q in found] == [
        ("Roof: A man sits. He", ["is here now.", "sings."], 1),
        ("A man", ["sits", "stands"], 0),
        ("Question: Why?\nAnswer:", ["x", "yy"], 1),
        ("Question: Why?\nAnswer:", ["x", "yy"], 0),
    ]
    assert found[3].where == f"{tmp_path / 'x.jsonl'}: line 4"


BAD = {
    "no JSON": "{",
    "a list": "[1]",
    "of neither form": '{"text": "x"}',
    "no label": '{"ctx": "a", "endings": ["b", "c"]}',
    "a label beyond": '{"ctx": "a", "endings": ["b", "c"], "label": 2}',
    "a negative label": '{"ctx": "a", "endings": ["b", "c"], "label": -1}',
    "a label that is no number": '{"ctx": "a", "endings": ["b", "c"], "label": "b"}',
    "one choice": '{"ctx": "a", "endings": ["b"], "label": 0}',
    "an empty choice": '{"ctx": "a", "endings": ["b", ""], "label": 0}',
    "choices that are numbers": '{"ctx": "a", "endings": [1, 2], "label": 0}',
    "no answer": '{"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}}',
    "an answer beyond": '{"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, '
    '"answerKey": "C"}',
    "labels for others": '{"question": "a", "choices": {"text": ["b", "c"], "label": ["A"]}, '
    '"answerKey": "A"}',
    "half a character": '{"ctx": "\\ud800", "endings": ["b", "c"], "label": 0}',
}


@pytest.mark.parametrize("what", BAD)
def test_a_malformed_line_is_named(tmp_path, what):
    path = lines(tmp_path / "x.jsonl", PLAIN, ARC)
    path.write_text(path.read_text() + "\n" + BAD[what])
    with pytest.raises(UserError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}: line 4: ") and "\n" not in str(caught.value)


def test_files_without_questions(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n\n")
    with pytest.raises(UserError, match="has no questions"):
        read_questions(path)
    path.write_bytes(b'{"ctx": "\xff"}')
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_questions(path)


def by_hand(model, context, choice):
    """The log-likelihood of a choice, from the logits of all its text at once."""
    before, whole = encode(context), encode(f"{context} {choice}")
    logits = model.logits(whole).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return sum(logs[i - 1, whole[i]] for i in range(len(before), len(whole)))


@pytest.mark.parametrize("text", ["A man on a roof", "A man on a roof  "])
def test_scores_as_whole_logits_give_them(plain, text):
    random = np.random.default_rng(6)
    letters = list("abcdefghij klm")
    made = []
    for i in range(12):
        choices = ["".join(random.choice(letters, n)).strip() + "x" for n in (3, 9, 5, 14)]
        made.append(Question(text, choices, i % 4, f"line {i}"))
    with Model.open(plain) as model:
        scores = [[by_hand(model, text.rstrip(), c) for c in q.choices] for q in made]
        seen = []
        found = answer(model, tokenized(made, encode, 48, None), lambda *done: seen.append(done))
    nbytes = np.array([[len(c) for c in q.choices] for q in made])
    labels = np.array([q.label for q in made])
    right = np.argmax(scores, axis=1) == labels
    normalised = np.argmax(np.array(scores) / nbytes, axis=1) == labels
    assert not np.array_equal(right, normalised)
    assert (found.accuracy, found.normalised) == (right.mean(), normalised.mean())
    error = np.sqrt(right.mean() * (1 - right.mean()) / 11)
    assert found.accuracy_error == pytest.approx(error)
    assert found.questions == 12 and seen[-1] == ("choices", 12, 12)


def test_the_context_is_processed_once(plain):
    question = Question("A man on a roof", ["is here", "has gone", "is on it"], 0, "line 1")
    [tokens] = tokenized([question], encode, 48, None)
    with Model.open(plain) as model:
        answer(model, [tokens])
        # All but the last token of the context once, and with each choice the rest but its end.
        rest = sum(own for own in tokens.own)
        assert model.token == len(encode(question.context)) - 1 + rest


def test_a_question_without_a_context_begins_as_a_text_does(plain):
    question = Question("", ["ab", "cd"], 0, "line 1")
    [tokens] = tokenized([question], encode, 48, 2)
    assert tokens.ids == [[2, *encode("ab")], [2, *encode("cd")]] and tokens.own == [2, 2]
    with Model.open(plain) as model:
        assert answer(model, [tokens]).questions == 1
    with pytest.raises(UserError, match="line 1: the question has no context"):
        tokenized([question], encode, 48, None)


def test_a_question_that_is_too_long_is_named():
    question = Question("a" * 50, ["ab", "cd"], 0, "x.jsonl: line 7")
    with pytest.raises(UserError, match=r"x\.jsonl: line 7: .* 53 tokens, the model's context 48"):
        tokenized([question], encode, 48, None)
