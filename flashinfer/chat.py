"""A conversation: the checkpoint's template, its history, and only new text processed each turn."""

import json
from importlib.util import find_spec

from flashinfer.formats.errors import UserError
from flashinfer.tokenizer import TextStream, Tokenizer
from flashinfer.worker import WorkerFailed

LEAST_CHARACTERS = 32  # that a token of a conversation is taken to have at most, or more


def chat_tokenizer(bundle, budget=None):
    """The Tokenizer of an open Bundle, with its chat template.

    Its process stays, and what it takes is set aside in the budget of a model opened afterwards.
    Raises as Tokenizer does, UserError where there is no template or no jinja2, FormatError where
    the template is damaged.
    """
    source = bundle.chat_template()
    if source is None:
        raise UserError(f"{bundle.path}: has no chat template; use flashinfer run")
    if find_spec("jinja2") is None:
        raise UserError("chat needs jinja2: pip install 'flashinfer[text]'")
    tokenizer = Tokenizer(bundle, budget)
    tokenizer.use_template(source)
    tokenizer.stay()
    return tokenizer


class Conversation:
    """Turns with an open Model, whose bundle has a chat template.

    messages   what was said: dicts of "role" and "content", as templates have them
    tokenizer  a ``chat_tokenizer`` made before the model was opened, whose budget then reckons
               with it; None: another one, beside that budget
    Needs the ``text`` extra. Raises as ``chat_tokenizer`` does.
    """

    def __init__(self, model, system=None, tokenizer=None):
        self.model, self.tokenizer = model, tokenizer or chat_tokenizer(model.bundle)
        self.system = system
        self.reset()

    @property
    def most_characters(self):
        """Characters of a text that is surely too long for the context."""
        return self.model.plan.context * max(LEAST_CHARACTERS, self.tokenizer.longest)

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
        }
        characters = sum(len(message["content"]) for message in self.messages)
        ids = None
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
        UserError, and forgets ``text``, where the context has no room left.
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
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})
