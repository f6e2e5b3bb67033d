"""Text to token ids and back, by the model's own ``tokenizer.json`` (needs ``tokenizers``)."""

from flashinfer.formats.errors import FormatError, UserError


class Tokenizer:
    """The tokenizer of an open Bundle. Raises UserError where there is none, or no library."""

    def __init__(self, bundle):
        text = bundle.tokenizer_json()
        if text is None:
            raise UserError(f"{bundle.path}: has no tokenizer; flashinfer run --tokens takes ids")
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                "text needs the tokenizers library: pip install 'flashinfer[text]'; token ids "
                "(--tokens) do without"
            ) from None
        try:
            self.inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            reason = str(error).splitlines()[0]
            raise FormatError(f"{bundle.path}: its tokenizer cannot be read: {reason}") from None

    def encode(self, text, special=True):
        """Token ids; with ``special`` with the tokens that every text begins or ends with."""
        return self.inner.encode(text, add_special_tokens=special).ids

    def token(self, token_id):
        """The text of a single token, special ones included, or None."""
        return None if token_id is None else self.inner.id_to_token(token_id)

    def decode(self, ids):
        return self.inner.decode(ids, skip_special_tokens=True)


class TextStream:
    """Turns tokens into text as they come, never half a character."""

    def __init__(self, tokenizer, context=()):
        """``context``: tokens that are already on the screen."""
        self.tokenizer = tokenizer
        self.ids = list(context)[-8:]
        self.shown = tokenizer.decode(self.ids) if self.ids else ""

    def add(self, token):
        """The text that became certain with this token."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self.ids) < 64:
            return ""  # half a character; the rest is in the tokens to come
        new, self.shown = text[len(self.shown) :], text
        if len(self.ids) > 32 and new:
            self.ids = self.ids[-8:]
            self.shown = self.tokenizer.decode(self.ids)
        return new

    def end(self):
        """What is left when no more tokens come."""
        return self.tokenizer.decode(self.ids)[len(self.shown) :]
