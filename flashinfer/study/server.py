"""What an OpenAI-compatible server says of a text: the log-probabilities of its likeliest tokens.

A server that echoes a prompt with its log-probabilities (vLLM) is asked once for each sequence. One
that does not (llama.cpp's) is asked for one token after each prefix; its prompt cache makes that
one token's work each.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from typing import Any

import numpy as np

from flashinfer.formats import bounded_json
from flashinfer.formats.arrays import Float64Array, Int64Array
from flashinfer.formats.errors import UserError, reason, shown
from flashinfer.formats.numbers import is_number, is_whole
from flashinfer.text.tokenizer import Tokenizer

SECONDS = 600.0  # until a server has to have answered
MOST_ANSWER = 64 << 20  # bytes
ID_MARK = "token_id:"  # what vLLM writes before an id where it is asked for ids
ROUNDING = 1e-3  # log-probabilities may be above 0 by so much
# Below lie no probabilities of float32, and servers write some number of their own; such tokens
# count as not named.
LEAST_LOG = -87.0

# Of a prediction: {token id: its log-probability}.
Named = dict[int, float]


def ids_by_text(tokenizer: Tokenizer) -> dict[str, int]:
    """{text of a token: its id}, of all tokens whose text is whole characters and no other's."""
    found: dict[str, int] = {}
    twice = set()
    for token_id in range(len(tokenizer.silent)):
        try:
            text = (tokenizer.piece(token_id, False) or b"").decode()
        except UnicodeDecodeError:
            continue
        if text in found:
            twice.add(text)
        found[text] = token_id
    return {text: token_id for text, token_id in found.items() if text and text not in twice}


class Server:
    """A server, asked by its ``/completions``.

    url         such as http://localhost:8080/v1
    top         tokens whose log-probabilities are asked for, at each position
    vocab_size  ids beyond are refused
    ids         {text of a token: its id}, for servers that name tokens by their text only; a token
                that is not in it is left out of the answer
    Raises UserError, in one line with the address, where the server is not there, refuses, or gives
    something else.
    """

    def __init__(self, url: str, top: int, vocab_size: int, ids: Mapping[str, int]) -> None:
        self.url, self.top, self.vocab_size, self.ids = url.rstrip("/"), top, vocab_size, ids
        models = self._ask("/models", None)
        try:
            self.model = models["data"][0]["id"]
        except (KeyError, IndexError, TypeError):
            raise self._strange("/models", models) from None
        self.echoes = True  # until it turns out not to

    def answers(
        self, token_ids: Sequence[int], length: int
    ) -> Iterator[tuple[Int64Array, Float64Array]]:
        """Yield (ids (n,), log-probabilities (n,)) for each prediction of a text, in order.

        The text is cut into sequences of ``length`` tokens; of each, all tokens but the first are
        predicted.
        """
        for start in range(0, len(token_ids) - 1, length):
            part = list(token_ids[start : start + length])
            for named in self._echoed(part) or self._one_by_one(part):
                kept = {token: log for token, log in named.items() if log >= LEAST_LOG}
                ids = np.array(list(kept), dtype=np.int64)
                yield ids, np.array(list(kept.values()), dtype=np.float64)

    def _echoed(self, ids: list[int]) -> list[Named] | None:
        """The predictions of ids[1:], asked at once; None where the server does not echo."""
        if not self.echoes:
            return None
        try:
            found = self._complete(ids, echo=True)
        except _Refused:
            found = []
        if len(found) > len(ids) + 1:
            raise UserError(
                f"{self.url}: finds {len(found) - 1} tokens in a prompt of {len(ids)}; it has to "
                "take token ids as they are"
            )
        self.echoes = len(found) >= len(ids)
        return found[1 : len(ids)] if self.echoes else None

    def _one_by_one(self, ids: list[int]) -> Iterator[Named]:
        """The predictions of ids[1:], asked one after the other."""
        for n in range(1, len(ids)):
            found = self._complete(ids[:n])
            if len(found) != 1:
                raise UserError(f"{self.url}: gives no log-probabilities of the token it predicts")
            yield found[0]

    def _complete(self, ids: list[int], **more: Any) -> list[Named]:
        """What the server says of each token in its answer about a prompt."""
        answer = self._ask("/completions", {
            "model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0,
            "logprobs": self.top, "return_tokens_as_token_ids": True, **more,
        })  # fmt: skip
        try:
            logprobs = answer["choices"][0]["logprobs"] or {}
            if "content" in logprobs:
                return [self._of_content(entry) for entry in logprobs["content"]]
            own = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
            tops = logprobs["top_logprobs"]
            return [self._of_texts(top, *one) for top, one in zip(tops, own, strict=True)]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise self._strange("/completions", answer) from None

    def _of_content(self, entry: Any) -> Named:
        """Of one token as llama.cpp's server writes it."""
        return dict(self._checked(top["id"], top["logprob"]) for top in entry["top_logprobs"])

    def _of_texts(self, top: Any, token: Any, log: Any) -> Named:
        """Of one token in OpenAI's form: the likeliest, and the token itself. The first token of a
        prompt has none."""
        named: Named = {}
        for text, value in (*(top or {}).items(), (token, log)):
            token_id = self._id(text)
            if token_id is not None and value is not None:
                named.update([self._checked(token_id, value)])
        return named

    def _id(self, text: str) -> int | None:
        if text.startswith(ID_MARK):
            return int(text.removeprefix(ID_MARK))
        return self.ids.get(text)

    def _checked(self, token_id: Any, log: Any) -> tuple[int, float]:
        if not is_whole(token_id, 0, self.vocab_size - 1) or not is_number(log, most=ROUNDING):
            raise ValueError
        return token_id, float(log)

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON that the server answers; body: what is posted, None: nothing, it is got."""
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(
                self.url + path, data, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                raw = response.read(MOST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            raise _Refused(f"{self.url}{path}: HTTP {error.code}: {_said(error)}") from None
        except urllib.error.URLError as error:
            raise UserError(f"{self.url}: cannot be asked: {_why(error.reason)}") from None
        except (OSError, HTTPException, ValueError) as error:
            raise UserError(f"{self.url}: cannot be asked: {_why(error)}") from None
        if len(raw) > MOST_ANSWER:
            raise UserError(f"{self.url}{path}: answers more than {MOST_ANSWER:,} bytes")
        return bounded_json.parse(raw, f"{self.url}{path}: the answer", finite=True)

    def _strange(self, path: str, answer: Any) -> UserError:
        return UserError(
            f"{self.url}{path}: does not answer as OpenAI's interface does, with log-probabilities "
            f"of token ids below {self.vocab_size}: {shown(answer)}"
        )


class _Refused(UserError):
    """The server answered with an HTTP error."""


def _said(error: urllib.error.HTTPError) -> str:
    """The beginning of what a server sent with an HTTP error."""
    try:
        return error.read(200).decode("utf-8", "replace") or str(error.reason)
    except (OSError, HTTPException, ValueError):
        return str(error.reason)


def _why(error: Any) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return reason(error) if isinstance(error, BaseException) else str(error)
