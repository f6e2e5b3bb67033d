"""A conversation by the checkpoint's template, of which each turn processes only the new text."""

import json
from collections.abc import Generator, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from flashinfer.formats.bundle.layout import TEMPLATE
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.plan.plan import Plan
from flashinfer.text.tokenizer import TextStream, Tokenizer
from flashinfer.text.worker import WorkerFailed

# The longest token is taken to have at least and at most so many characters.
CHARACTERS = (32, 512)
MOST_TEMPLATE = 1 << 20  # bytes


def chat_tokenizer(bundle: Bundle, context: int, budget: int | str | None = None) -> Tokenizer:
    """The Tokenizer of an open Bundle, with its chat template, for up to ``context`` tokens.

    The tokenizer's process stays, and its memory is set aside in the budget of a model that is
    opened afterwards. Raises as Tokenizer does, UserError where there is no template or jinja2 is
    not installed, FormatError where the template is damaged.
    """
    place = bundle.where(TEMPLATE)
    if place is None:
        raise UserError(f"{bundle.path}: has no chat template; use flashinfer run")
    if place.nbytes > MOST_TEMPLATE:
        raise FormatError(f"{bundle.path}: its chat template of {place.nbytes} bytes is too long")
    if find_spec("jinja2") is None:
        raise UserError("chat needs jinja2: pip install 'llm-in-a-flash[text]'")
    tokenizer = Tokenizer(bundle, budget)
    tokenizer.use_template(bundle.chat_template() or "")
    tokenizer.stay(context)
    return tokenizer


class TextModel(Protocol):
    """The part of a Model that a conversation uses."""

    bundle: Bundle
    config: ModelConfig
    plan: Plan

    @property
    def position(self) -> int: ...

    def generate(
        self,
        token_ids: Sequence[int],
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        seed: int | None = ...,
        stop_at_eos: bool = ...,
        reuse: bool = ...,
    ) -> Generator[int, None, None]: ...


class Conversation:
    """Turns with an open Model, whose bundle has a chat template.

    system     the system's message, or None
    tokenizer  a ``chat_tokenizer`` that was made before the model was opened, so that the model's
               budget includes it; None: a new one, which takes memory beyond the budget
    Needs the ``text`` extra. Raises as ``chat_tokenizer`` does.
    """

    messages: list[dict[str, str]]  # so far, each with a "role" and its "content"

    def __init__(
        self, model: TextModel, system: str | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        self.tokenizer = tokenizer or chat_tokenizer(model.bundle, model.plan.context)
        self.model, self.system = model, system
        self.reset()

    @property
    def most_characters(self) -> int:
        """A text of more characters is certainly too long for the context."""
        least, most = CHARACTERS
        return self.model.plan.context * min(max(least, self.tokenizer.longest), most)

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def restore(self, messages: Sequence[dict[str, str]]) -> None:
        """Go on with these messages; the first one may be the system's."""
        self.messages = [dict(message) for message in messages]
        systems = [one["content"] for one in self.messages[:1] if one["role"] == "system"]
        self.system = systems[0] if systems else None

    def ids(self) -> list[int]:
        """The conversation as token ids, up to where the reply begins.

        Raises UserError where the template refuses the conversation, or it is far too long.
        """
        config = self.model.config
        special = {
            "bos_token": config.bos_token_id,
            "eos_token": next(iter(config.eos_token_ids), None),
            **self.model.bundle.special_tokens,
        }
        characters = sum(len(message["content"]) for message in self.messages)
        ids = None
        self.tokenizer.begin()
        if characters <= self.most_characters:
            try:
                messages = json.dumps(self.messages).encode("ascii")
                ids = self.tokenizer.ask(
                    "render", messages, characters, special=special,
                    characters_at_most=self.most_characters,
                )["ids"]  # fmt: skip
            except WorkerFailed as failed:
                raise UserError(f"the chat template refuses this conversation: {failed}") from None
        if ids is None:
            raise UserError(
                f"the conversation does not fit the context of {self.model.plan.context} tokens; "
                "/reset begins anew, --ctx-size gives more room"
            )
        if not ids:
            raise UserError("the chat template makes no text of this conversation")
        return ids

    def say(self, text: str, max_new_tokens: int, **sampling: Any) -> Generator[str, None, None]:
        """Yield the reply to ``text`` as it comes, in pieces of whole characters.

        sampling  arguments of Sampler
        The yielded pieces become a part of the conversation, even if the caller stops early. Raises
        UserError, and forgets ``text``, where the context has no room left, or the template or the
        model refuses the conversation.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self.ids()
            room = self.model.plan.context - len(ids) + 1
            if room < 1:
                raise UserError(
                    f"the conversation's {len(ids)} tokens do not fit the context of "
                    f"{self.model.plan.context}; /reset begins anew, --ctx-size gives more room"
                )
        except BaseException:
            self.messages.pop()
            raise
        tokens = self.model.generate(ids, min(max_new_tokens, room), reuse=True, **sampling)
        stream = TextStream(self.tokenizer)
        said: list[str] = []
        try:
            for token in tokens:
                if token not in self.model.config.eos_token_ids:
                    said.append(stream.add(token))
                    yield said[-1]
            said.append(stream.end())
            yield said[-1]
        except UserError:
            if not said:  # nothing was shown, so the turn did not happen
                self.messages.pop()
            raise
        finally:
            if self.messages and self.messages[-1]["role"] == "user":
                self.messages.append({"role": "assistant", "content": "".join(said)})
