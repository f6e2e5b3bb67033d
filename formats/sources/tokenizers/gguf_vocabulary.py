"""The vocabulary inside a GGUF file as the contents of a ``tokenizer.json``."""

from typing import Any

from ...bounded_json import JsonObject
from ...errors import FormatError, shown
from ...numbers import is_number, is_whole
from . import pre_tokenizers, sentencepiece
from .parts import Around, added_tokens, byte_level_bpe
from .sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Pieces
from .vocabulary import pairs_of


def gguf_tokenizer(metadata: JsonObject) -> JsonObject | None:
    """The tokenizer in a GGUF file's metadata, or None where the file has none.

    Raises FormatError where it is damaged, or of an unknown kind.
    """
    model, tokens = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "tokens"))
    if not isinstance(tokens, list) or model in (None, "no_vocab", "none"):
        return None
    if len(set(tokens)) < len(tokens):
        raise FormatError("two of its tokens are the same")
    kinds = _numbers(metadata, "token_type", len(tokens), NORMAL)
    if model == "llama":
        return _sentencepiece(metadata, tokens, kinds)
    if model == "gemma4":
        return _ranked_pieces(metadata, tokens, kinds)
    if model == "gpt2":
        return _byte_level(metadata, tokens, kinds)
    raise FormatError(f"its kind of tokenizer, {shown(model)}, is not known")


def _sentencepiece(metadata: JsonObject, tokens: list[str], kinds: list[int]) -> JsonObject:
    scores = _numbers(metadata, "scores", len(tokens), 0.0)
    space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    remove = bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))
    if "tokenizer.ggml.precompiled_charsmap" in metadata:
        raise FormatError("its tokenizer has a map of characters, which is not supported here")
    pieces = Pieces(tokens, scores, kinds, space_first=space, remove_spaces=remove)
    return sentencepiece.as_json(pieces, _around(metadata, tokens, True))


def _ranked_pieces(metadata: JsonObject, tokens: list[str], kinds: list[int]) -> JsonObject:
    """Gemma 4's: pieces as SentencePiece has them, of which the merges are listed. llama.cpp lets
    each text begin with the BOS token, and cuts it at line feeds."""
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise FormatError("tokenizer.ggml.merges is missing")
    pairs, known = pairs_of(merges, "tokenizer.ggml.merges"), set(tokens)
    if not all(part in known for pair in pairs for part in (*pair, "".join(pair))):
        raise FormatError("tokenizer.ggml.merges has a piece that is no token")
    scores = [0.0] * len(tokens)
    pieces = Pieces(tokens, scores, kinds, space_first=False, ranked=pairs, lines=True)
    metadata = {**metadata, "tokenizer.ggml.add_bos_token": True}
    return sentencepiece.as_json(pieces, _around(metadata, tokens, True))


def _byte_level(metadata: JsonObject, tokens: list[str], kinds: list[int]) -> JsonObject:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name == "default":
        name = pre_tokenizers.OLD.get(metadata.get("general.architecture", ""), name)
    if not isinstance(name, str) or name not in pre_tokenizers.PATTERNS:
        raise FormatError(f"how its tokenizer cuts words, {shown(name)}, is not known")
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise FormatError("tokenizer.ggml.merges is missing")
    vocab = {token: i for i, token in enumerate(tokens)}
    typed = list(zip(tokens, kinds, strict=True))
    special = {token for token, kind in typed if kind in (CONTROL, UNKNOWN) and token}
    plain = {token for token, kind in typed if kind == USER_DEFINED and token}
    return byte_level_bpe(
        vocab,
        pairs_of(merges, "tokenizer.ggml.merges"),
        added_tokens(vocab, special, plain),
        pre_tokenizers.split(pre_tokenizers.PATTERNS[name]),
        nfc=name in pre_tokenizers.NFC,
        around=_around(metadata, tokens, name in pre_tokenizers.BEGUN),
        ignore_merges=name in pre_tokenizers.WHOLE_WORDS,
    )


def _around(metadata: JsonObject, tokens: list[str], begun: bool) -> Around:
    """The tokens around every text.

    begun  whether texts begin with the BOS token where the file does not say
    """

    def token(name: str, default: bool) -> str | None:
        i = metadata.get(f"tokenizer.ggml.{name}_token_id")
        wanted = metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        return tokens[i] if wanted and is_whole(i, 0, len(tokens) - 1) else None

    return Around(token("bos", begun), token("eos", False))


def _numbers(metadata: JsonObject, key: str, n: int, default: float) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    values = [default] * n if values is None else values
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, list) and len(values) == n and all(is_number(v) for v in values):
        return values
    raise FormatError(f"tokenizer.ggml.{key} is not {n} numbers")
