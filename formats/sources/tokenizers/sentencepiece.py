"""SentencePiece's ``tokenizer.model``, and its vocabularies inside GGUF, as ``tokenizer.json``.

The file is a protocol buffer: ModelProto in sentencepiece_model.proto. The size of everything made
of it is bounded by the file's size.
"""

import base64
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any

from ...bounded_json import JsonObject
from ...errors import FormatError
from ...files import read_bytes
from .parts import NOTHING_AROUND, Around, added_tokens, begins_and_ends, cut_out

# The kinds of pieces. GGUF's numbers are the same.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
SPACE = "\u2581"
# The most characters of all merges together per character of the vocabulary; real ones have a few.
MERGES_PER_CHARACTER = 64


@dataclass
class Pieces:
    """A SentencePiece vocabulary: ``pieces``, ``scores`` and ``kinds`` by id.

    charsmap       the normalizer's map of characters, as its file has it
    folds_case     whether that map makes capitals small
    space_first    every text gets a space in front
    remove_spaces  spaces around a text, and all but one between words, are removed
    added          tokens beside the vocabulary: the entries that ``added_tokens`` makes
    ranked         the merges of a BPE, the first to be merged first; None: they follow from scores
    lines          runs of line feeds are words of their own
    """

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    model: int = BPE
    charsmap: bytes = b""
    folds_case: bool = False
    space_first: bool = True
    remove_spaces: bool = False
    added: list[JsonObject] = field(default_factory=list)
    ranked: list[list[str]] | None = None
    lines: bool = False

    def of_kind(self, *kinds: int) -> list[str]:
        return [p for p, kind in zip(self.pieces, self.kinds, strict=True) if kind in kinds]


def read(path: Path) -> Pieces:
    """The Pieces of a ``tokenizer.model``.

    Raises FormatError where the file is damaged, or has options that are not supported.
    """
    found = Pieces([], [], [])
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in fields(memoryview(read_bytes(path))):
            if number == 1:
                piece = dict(fields(value))
                found.pieces.append(bytes(view(piece[1])).decode("utf-8"))
                found.scores.append(struct.unpack("<f", view(piece.get(2, b"\0\0\0\0")))[0])
                found.kinds.append(number_of(piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(fields(view(value)))
            elif number == 3:
                normalizer = dict(fields(view(value)))
            elif number == 5 and any(n in (2, 6) and len(view(v)) for n, v in fields(view(value))):
                raise FormatError(f"{path}: changes the text that it decodes, not supported here")
        found.model = number_of(trainer.get(3, UNIGRAM))
        found.charsmap = bytes(view(normalizer.get(2, b"")))
        found.folds_case = bytes(view(normalizer.get(1, b""))).endswith(b"_cf")
        found.space_first = bool(number_of(normalizer.get(3, 1)))
        found.remove_spaces = bool(number_of(normalizer.get(4, 1)))
        plain_spaces = not number_of(normalizer.get(5, 1)) or number_of(trainer.get(24, 0))
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    except FormatError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, struct.error):
        raise FormatError(f"{path}: is not a SentencePiece model") from None
    if not found.pieces:
        raise FormatError(f"{path}: is not a SentencePiece model")
    if found.model not in (UNIGRAM, BPE) or plain_spaces:
        what = "its kind of model" if found.model not in (UNIGRAM, BPE) else "how it writes spaces"
        raise FormatError(f"{path}: {what} is not supported; save the tokenizer as tokenizer.json")
    return found


def as_json(
    vocabulary: Pieces, around: Around = NOTHING_AROUND, prefix_once: bool = False
) -> JsonObject:
    """The contents of a ``tokenizer.json``. Raises FormatError where Pieces contradict each other.

    prefix_once  only the text as a whole gets a space in front, not its parts between special
                 tokens
    """
    v = vocabulary
    if len(set(v.pieces)) < len(v.pieces):
        raise FormatError("two of its pieces are the same")
    if not all(math.isfinite(score) for score in v.scores):
        raise FormatError("a piece's score is not a finite number")
    vocab = {piece: i for i, piece in enumerate(v.pieces)}
    cuts = user_defined_cuts(v) + ([cut_out(r"\n+")] if v.lines else [])
    model = _model(v, vocab, bool(cuts))
    if v.space_first and prefix_once:
        cuts.append({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first",
                     "split": False})  # fmt: skip
    decoders = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if v.space_first:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    special = v.of_kind(UNKNOWN, CONTROL)
    added = {token["content"]: token for token in added_tokens(vocab, special) + v.added}
    ids = {**vocab, **{token: entry["id"] for token, entry in added.items()}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added.values(), key=lambda token: token["id"]),
        "normalizer": {"type": "Sequence", "normalizers": normalizers(v, prefix_once)},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts} if cuts else None,
        "post_processor": begins_and_ends(around, ids),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _model(v: Pieces, vocab: dict[str, int], ignore_merges: bool) -> JsonObject:
    """The "model" of a ``tokenizer.json``; vocab: {piece: id}."""
    unknown = next(iter(v.of_kind(UNKNOWN)), None)
    byte_fallback = BYTE in v.kinds
    if v.model != UNIGRAM:
        return {
            "type": "BPE", "dropout": None, "unk_token": unknown,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": byte_fallback, "ignore_merges": ignore_merges, "vocab": vocab,
            "merges": merges(v) if v.ranked is None else v.ranked,
        }  # fmt: skip
    if unknown is None:
        raise FormatError("it has no piece for unknown characters")
    return {
        "type": "Unigram", "unk_id": vocab[unknown], "byte_fallback": byte_fallback,
        "vocab": [[p, s] for p, s in zip(v.pieces, v.scores, strict=True)],
    }  # fmt: skip


def normalizers(vocabulary: Pieces, prefix_once: bool) -> list[JsonObject]:
    """The steps by which SentencePiece changes a text before it looks for pieces."""
    steps: list[JsonObject] = []
    if vocabulary.charsmap:
        text = base64.b64encode(vocabulary.charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": text})
    if vocabulary.remove_spaces:
        steps += [_replace({"Regex": r"\A +| +\z"}, ""), _replace({"Regex": "  +"}, " ")]
    if vocabulary.space_first and not prefix_once:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append(_replace({"String": " "}, SPACE))
    return steps


def user_defined_cuts(vocabulary: Pieces) -> list[JsonObject]:
    """The pre-tokenizers that cut out user-defined pieces, which precede all others, longest first.

    Raises FormatError where the normalizer may change such a piece.
    """
    pieces = sorted(vocabulary.of_kind(USER_DEFINED), key=len, reverse=True)
    pieces = [piece for piece in pieces if piece]
    if not pieces:
        return []
    kept = [
        p
        for p in pieces
        if p.isascii() and p.isprintable() and not (vocabulary.folds_case and p != p.lower())
    ]
    spaces = vocabulary.remove_spaces and any(SPACE * 2 in p.replace(" ", SPACE) for p in pieces)
    if spaces or (vocabulary.charsmap and kept != pieces):
        raise FormatError("its normalizer may change its user-defined pieces; not supported")
    pattern = "|".join(re.escape(piece) for piece in pieces)
    return [cut_out(pattern)]


def merges(vocabulary: Pieces) -> list[tuple[str, str]]:
    """The merges of a BPE, as pairs of pieces, the first to be merged first.

    SentencePiece joins the two neighbours whose piece has the highest score. The merges are
    therefore all pairs of pieces that make a piece, by that piece's score.
    """
    v = vocabulary
    ids = {piece: i for i, piece in enumerate(v.pieces)}
    before = longest_prefixes(v.pieces)
    behind = longest_prefixes([piece[::-1] for piece in v.pieces])
    found: list[tuple[float, tuple[str, str]]] = []
    left = MERGES_PER_CHARACTER * (sum(map(len, v.pieces)) + 1024)
    for i, (piece, score, kind) in enumerate(zip(v.pieces, v.scores, v.kinds, strict=True)):
        if kind not in (NORMAL, USER_DEFINED):
            continue
        # A cut must leave a piece on either side: it comes after a prefix and before a suffix.
        cuts = {len(v.pieces[j]) for j in chain(before, i)}
        cuts &= {len(piece) - len(v.pieces[j]) for j in chain(behind, i)}
        left -= len(piece) * len(cuts)
        if left < 0:
            raise FormatError("its pieces are made of each other in too many ways")
        pairs = [(piece[:cut], piece[cut:]) for cut in cuts]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(score, pair) for pair in pairs]
    found.sort(key=lambda scored: -scored[0])
    return [pair for _, pair in found]


def longest_prefixes(pieces: list[str]) -> list[int | None]:
    """For each piece the index of the longest other one that it begins with, or None.

    In sorted order a piece follows those that it begins with, so that one pass finds them.
    """
    longest: list[int | None] = [None] * len(pieces)
    open_pieces: list[int] = []
    for i in sorted(range(len(pieces)), key=pieces.__getitem__):
        while open_pieces and not pieces[i].startswith(pieces[open_pieces[-1]]):
            open_pieces.pop()
        if open_pieces:
            longest[i] = open_pieces[-1]
        if pieces[i]:
            open_pieces.append(i)
    return longest


def chain(longest: list[int | None], piece: int) -> Iterator[int]:
    """The indices of all pieces that ``piece`` begins with."""
    prefix = longest[piece]
    while prefix is not None:
        yield prefix
        prefix = longest[prefix]


def _replace(pattern: JsonObject, content: str) -> JsonObject:
    return {"type": "Replace", "pattern": pattern, "content": content}


# ---------------------------------------------------------------- protocol buffers


def fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a protocol buffer's message; a value is an int or a memoryview."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        value: int | memoryview
        if kind == 0:
            value, at = _varint(data, at)
        else:
            length, at = (8, at) if kind == 1 else (4, at) if kind == 5 else _varint(data, at)
            if kind not in (1, 2, 5) or length > len(data) - at:
                raise ValueError("cut")
            value, at = data[at : at + length], at + length
        yield key >> 3, value


def view(value: Any) -> memoryview:
    """A field's bytes. Raises TypeError where the field is a number."""
    return memoryview(value)


def number_of(value: Any) -> int:
    """A field's number. Raises TypeError where the field holds bytes."""
    return index(value)


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(the number encoded at index ``at``, the index behind it)."""
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("too long")
