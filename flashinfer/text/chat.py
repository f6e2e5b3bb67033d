"""A conversation: the checkpoint's template, its history, and only new text processed each turn."""

import json
from importlib.util import find_spec

from flashinfer.formats.bundle.layout import TEMPLATE
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.text.tokenizer import TextStream, Tokenizer
from flashinfer.text.worker import WorkerFailed

CHARACTERS = (32, 512)  # of the longest token: at least, and at most, that its length is taken for
MOST_TEMPLATE = 1 << 20  # bytes


def chat_tokenizer(bundle, context, budget=None):
    """The Tokenizer of an open Bundle, with its chat template, for up to ``context`` tokens.

    Its process stays, and what it takes is set aside in the budget of a model opened afterwards.
    Raises as Tokenizer does, UserError where there is no template or no jinja2, FormatError where
    the template is damaged.
    """
    place = bundle.where(TEMPLATE)
    if place is None:
        raise UserError(f"{bundle.path}: has no chat template; use flashinfer run")
    if place[1] > MOST_TEMPLATE:
        raise FormatError(f"{bundle.path}: its chat template of {place[1]} bytes is too long")
    if find_spec("jinja2") is None:
        raise UserError("chat needs jinja2: pip install 'llm-in-a-flash[text]'")
    tokenizer = Tokenizer(bundle, budget)
    tokenizer.use_template(bundle.chat_template())
    tokenizer.stay(context)
    return tokenizer


class Conversation:
    """Turns with an open Model, whose bundle has a chat template.

    messages   what was said: dicts of "role" and "content", as templates have them
    tokenizer  a ``chat_tokenizer`` made before the model was opened, whose budget then reckons
               with it; None: another one, beside that budget
    Needs the ``text`` extra. Raises as ``chat_tokenizer`` does.
    """

    def __init__(self, model, system=None, tokenizer=None):
        self.tokenizer = tokenizer or chat_tokenizer(model.bundle, model.plan.context)
        self.model, self.system = model, system
        self.reset()

    @property
    def most_characters(self):
        """Characters of a text that is surely too long for the context."""
        least, most = CHARACTERS
        return self.model.plan.context * min(max(least, self.tokenizer.longest), most)

    def reset(self):
        """Forget what was said, but for the system's message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ids(self):
        """The conversation as token ids, up to where the reply begins.

        Raises UserError where the template refuses it, or it is far too long.
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

    def say(self, text, max_new_tokens, **sampling):
        """Yield the reply to ``text`` as it comes, in pieces of whole characters.

        What was yielded is part of the conversation, also where the caller stops early. Raises
        UserError, and forgets ``text``, where the context has no room left, or the template or the
        model refuses it.
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
        stream, said = TextStream(self.tokenizer), []
        try:
            for token in tokens:
                if token not in self.model.config.eos_token_ids:
                    said.append(stream.add(token))
                    yield said[-1]
            said.append(stream.end())
            yield said[-1]
        except UserError:
            if not said:  # nothing was shown: the turn did not happen
                self.messages.pop()
            raise
        finally:
            if self.messages and self.messages[-1]["role"] == "user":
                self.messages.append({"role": "assistant", "content": "".join(said)})
