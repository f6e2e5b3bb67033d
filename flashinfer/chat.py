"""A conversation: the checkpoint's template, its history, and only new text processed each turn."""

import datetime

from flashinfer.formats.errors import FormatError, UserError
from flashinfer.tokenizer import TextStream, Tokenizer


class Conversation:
    """Turns with an open Model, whose bundle has a chat template.

    messages  what was said: dicts of "role" and "content", as templates have them
    Needs the ``text`` extra. Raises UserError where the bundle has no template, or libraries
    are missing, FormatError where the template is damaged.
    """

    def __init__(self, model, system=None):
        self.model, self.tokenizer = model, Tokenizer(model.bundle)
        self.template = compiled(model.bundle)
        self.system = system
        self.reset()

    def reset(self):
        """Forget what was said, but for the system's message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ids(self):
        """The conversation as token ids, up to where the reply begins."""
        special = {
            role: self.tokenizer.token(token) or ""
            for role, token in (
                ("bos_token", self.model.config.bos_token_id),
                ("eos_token", next(iter(self.model.config.eos_token_ids), None)),
            )
        }
        try:
            text = self.template.render(
                messages=self.messages, add_generation_prompt=True, **special
            )
        except Exception as error:  # whatever a template from a file may raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"the chat template refuses this conversation: {reason}") from None
        return self.tokenizer.encode(text, special=False)

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
        except UserError:
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


def compiled(bundle):
    """The bundle's template, in a sandbox: it comes from a file that nobody vouches for."""
    source = bundle.chat_template()
    if source is None:
        raise UserError(f"{bundle.path}: has no chat template; use flashinfer run")
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("chat needs jinja2: pip install 'flashinfer[text]'") from None

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.exceptions.TemplateError as error:
        raise FormatError(f"{bundle.path}: its chat template is damaged: {error}") from None
