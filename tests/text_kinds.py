"""Small tokenizers of every kind, and what holds one in the place of a Bundle."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from flashinfer.formats.sources.tokenizers.parts import added_tokens, byte_level_bpe
from flashinfer.formats.sources.tokenizers.pre_tokenizers import GPT2, split
from flashinfer.formats.sources.tokenizers.sentencepiece import Pieces, as_json

LETTERS = "abcdefgh .,'n"
SPECIAL = ["<s>", "</s>"]


class OfText:
    """Enough of a Bundle to hold a tokenizer, in a file of its own."""

    def __init__(self, folder, text):
        self.path = folder / "x.flash"
        self.data = text.encode("utf-8", "surrogatepass")
        self.path.write_bytes(b"head" + self.data)

    def where(self, name):
        return 4, len(self.data)


def byte_level():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, *SPECIAL, "ab", "Ġab"])}
    added = added_tokens(vocab, SPECIAL)
    return byte_level_bpe(vocab, [["a", "b"], ["Ġ", "ab"]], added, split((GPT2,)))


def byte_fallback(space_first):
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    pieces = ["<unk>", *SPECIAL, *byte_tokens, "▁", *LETTERS.replace(" ", ""), "▁a", "▁▁", "일"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)]
    scores = [-float(i) for i in range(len(pieces))]
    return as_json(Pieces(pieces, scores, kinds, space_first=space_first))


def made(model, decoder, **parts):
    inner = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(inner, name, part)
    if decoder is not None:
        inner.decoder = decoder
    inner.add_special_tokens(SPECIAL)
    return json.loads(inner.to_str())


def unigram():
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS), ("▁ab", -4.0)]
    return made(
        models.Unigram(pieces, 0), decoders.Metaspace(), pre_tokenizer=pre_tokenizers.Metaspace()
    )


def word_piece(cleanup):
    pieces = ["[UNK]", *LETTERS, *(f"##{c}" for c in LETTERS), "ab", "##cd", "'s", "'", "do"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return made(
        models.WordPiece(vocab, unk_token="[UNK]"), decoders.WordPiece(cleanup=cleanup),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )  # fmt: skip


def undecoded():
    vocab = {piece: i for i, piece in enumerate(["[UNK]", "ab", "cd", "é"])}
    return made(
        models.WordLevel(vocab, "[UNK]"), None, pre_tokenizer=pre_tokenizers.Whitespace()
    )  # fmt: skip


def plain_added():
    """A token that is no special one but stands outside of the vocabulary, with a space in it."""
    inner = tokenizers.Tokenizer.from_str(json.dumps(byte_level()))
    inner.add_tokens(["<tool call>", "[x]"])
    return json.loads(inner.to_str())


KINDS = {
    "byte-level BPE": byte_level,
    "added tokens": plain_added,
    "byte fallback, a space in front": lambda: byte_fallback(True),
    "byte fallback": lambda: byte_fallback(False),
    "Unigram": unigram,
    "WordPiece": lambda: word_piece(False),
    "WordPiece, cleaned up": lambda: word_piece(True),
    "no decoder": undecoded,
}
