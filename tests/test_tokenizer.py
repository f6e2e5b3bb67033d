import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashinfer.formats.bundle import Bundle
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.tokenizer import TextStream, Tokenizer

tokenizers = pytest.importorskip("tokenizers")


class OfText:
    """Enough of a Bundle to hold a tokenizer."""

    path = "x.flash"

    def __init__(self, text):
        self.tokenizer_json = lambda: text


def byte_level():
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(OfText(inner.to_str()))


BYTES = byte_level()


@given(st.text(max_size=120))
def test_a_stream_says_the_text_and_never_half_a_character(text):
    ids = BYTES.encode(text)
    stream = TextStream(BYTES)
    pieces = [stream.add(token) for token in ids]
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == text


def test_half_a_character_at_the_end_is_not_lost():
    stream = TextStream(BYTES)
    assert [stream.add(token) for token in BYTES.encode("é")[:1]] == [""]
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"


def test_no_tokenizer(plain, tmp_path):
    with pytest.raises(UserError, match="--tokens"):
        Tokenizer(OfText(None))


def test_damaged_tokenizer():
    with pytest.raises(FormatError, match="cannot be read"):
        Tokenizer(OfText('{"model": 3}'))


def test_without_the_library(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install"):
        Tokenizer(OfText("{}"))
    with Bundle(plain) as bundle:
        assert bundle.config.vocab_size == 96
