"""A model beside a server: both kinds of answers, and servers that answer something else."""

import socket

import numpy as np
import pytest

from completions_server import Answers, Echoing, LlamaCpp, Silent, serving
from flashinfer import Model, UserError
from flashinfer.study.against import compare_server
from flashinfer.study.divergence import Comparison
from flashinfer.study.server import Server, ids_by_text

VOCABULARY, CONTEXT = 96, 15
IDS = np.random.default_rng(3).integers(3, VOCABULARY, 40).tolist()


@pytest.fixture(scope="module")
def theirs(plain):
    """ids -> log-probabilities (T, VOCABULARY) of another engine, as lists."""
    shift = np.random.default_rng(1).normal(0, 0.3, VOCABULARY)

    def logits(ids):
        with Model.open(plain, context=CONTEXT) as model:
            rows = model.logits(ids).astype(np.float64) + shift
        return (rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))).tolist()

    return logits


def compared(plain, url, top, ids=None):
    with Model.open(plain, context=CONTEXT) as model:
        return compare_server(model, IDS, Server(url, top, VOCABULARY, ids or {}))


def expected(plain, theirs):
    comparison = Comparison()
    with Model.open(plain, context=CONTEXT) as model:
        for start in range(0, len(IDS), CONTEXT):
            part = IDS[start : start + CONTEXT]
            other = np.array(theirs(part))
            for base, row, token in zip(model.logits(part), other, part[1:], strict=False):
                comparison.add(base, row, token)
    return comparison


@pytest.mark.parametrize("kind", [Echoing, LlamaCpp, Silent])
def test_the_whole_vocabulary_gives_the_whole_divergence(plain, theirs, kind):
    engine = kind(theirs)
    with serving(engine) as url:
        found = compared(plain, url, VOCABULARY)
    right = expected(plain, theirs)
    assert found.tokens == len(IDS) - 3 and found.named == VOCABULARY
    assert found.distance.kl_mean == pytest.approx(right.distance().kl_mean, rel=1e-5)
    assert found.other.perplexity == pytest.approx(right.model.perplexity)
    assert found.base == right.base
    assert len(engine.asked) == (3 if kind is Echoing else found.tokens + (kind is Silent))


@pytest.mark.parametrize("kind", [Echoing, LlamaCpp])
def test_the_likeliest_tokens_give_a_lower_bound(plain, theirs, kind):
    with serving(kind(theirs)) as url:
        found = compared(plain, url, 5)
    right = expected(plain, theirs)
    assert 0 < found.distance.kl_mean < right.distance().kl_mean
    assert found.distance.same_top == right.distance().same_top
    if kind is Echoing:  # which names each token of the text besides
        assert found.other.perplexity == pytest.approx(right.model.perplexity)
    else:
        assert found.other is None and found.distance.log_ratio is None


def test_probabilities_that_float32_does_not_have_are_not_named(plain, theirs):
    def with_placeholders(ids):
        return [[-9999.0 if i % 2 else log for i, log in enumerate(row)] for row in theirs(ids)]

    with serving(LlamaCpp(with_placeholders)) as url:
        found = compared(plain, url, VOCABULARY)
    assert found.named == VOCABULARY / 2
    assert found.distance.kl_mean <= expected(plain, theirs).distance().kl_mean


def test_tokens_that_are_named_by_their_text(plain, theirs):
    names = {f"<{i}>": i for i in range(VOCABULARY) if i % 10}  # a tenth of them is unknown
    with serving(Echoing(theirs, "<{}>".format)) as url:
        found = compared(plain, url, VOCABULARY, names)
    right = expected(plain, theirs)
    assert 0 < found.distance.kl_mean <= right.distance().kl_mean
    assert found.named == len(names) and found.other is None


def of_one(logprobs):
    return {"choices": [{"logprobs": logprobs}]}


STRANGE = {
    "no JSON": (b"<html>", "completions: the answer: not JSON"),
    "NaN": (b'{"choices": [{"logprobs": {"content": [NaN]}}]}', "NaN is not a number"),
    "a list": ([], "does not answer as OpenAI's interface does"),
    "no log-probabilities": (of_one(None), "does not answer as OpenAI's interface does"),
    "none of a token": (of_one({"content": []}), "gives no log-probabilities of the token"),
    "an id beyond": (
        of_one({"content": [{"top_logprobs": [{"id": VOCABULARY, "logprob": -1.0}]}]}),
        "of token ids below 96",
    ),
    "a probability above 1": (
        of_one({"content": [{"top_logprobs": [{"id": 3, "logprob": 1.0}]}]}),
        "does not answer as",
    ),
    "lists of other lengths": (
        of_one({"tokens": ["a"], "token_logprobs": [], "top_logprobs": []}),
        "does not answer as",
    ),
}


@pytest.mark.parametrize("what", STRANGE)
def test_strange_answers_are_one_line(plain, what):
    answer, message = STRANGE[what]
    with serving(Answers(answer)) as url, pytest.raises(UserError, match=message) as caught:
        compared(plain, url, 5)
    assert str(caught.value).startswith(url) and "\n" not in str(caught.value)


def test_a_server_that_adds_a_token(plain):
    class Adding(Echoing):
        def complete(self, body):
            return super().complete({**body, "prompt": [2, *body["prompt"]]})

    def uniform(ids):
        return np.full((len(ids), VOCABULARY), -np.log(VOCABULARY)).tolist()

    with serving(Adding(uniform)) as url, pytest.raises(UserError) as caught:
        compared(plain, url, 5)
    assert str(caught.value).startswith(f"{url}: finds 16 tokens in a prompt of 15")


def test_a_server_that_refuses_says_why(plain):
    class Refusing(Echoing):
        def complete(self, body):
            raise ValueError("too many logprobs")

    with serving(Refusing(None)) as url:
        with pytest.raises(UserError, match=r"HTTP 400: .*too many logprobs") as caught:
            compared(plain, url, 5)
        assert str(caught.value).startswith(url)


def test_a_server_that_has_no_models():
    class Empty(Echoing):
        def models(self):
            return {"data": []}

    with serving(Empty(None)) as url, pytest.raises(UserError, match="models: does not answer as"):
        Server(url, 5, VOCABULARY, {})


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="cannot be asked: Connection refused"):
        Server(f"http://127.0.0.1:{port}/v1", 5, VOCABULARY, {})


@pytest.mark.parametrize("url", ["http://", "http://[", "http://a b/v1", "http://host:port/v1"])
def test_no_address(url):
    with pytest.raises(UserError, match="cannot be asked"):
        Server(url, 5, VOCABULARY, {})


def test_tokens_by_their_text():
    class Tokenizer:
        silent = [False] * 5

        def piece(self, token_id, first):
            return [None, b"a", b"\xff", b" the", b"a"][token_id]

    assert ids_by_text(Tokenizer()) == {" the": 3}
