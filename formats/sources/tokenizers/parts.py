"""The parts of a ``tokenizer.json`` that every kind of tokenizer is made of."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ...bounded_json import JsonObject


class Around(NamedTuple):
    """The tokens that every text begins and ends with."""

    first: str | None = None
    last: str | None = None


NOTHING_AROUND = Around()


def added_tokens(
    ids: Mapping[str, int], special: Iterable[str], plain: Iterable[str] = ()
) -> list[JsonObject]:
    """The entries of "added_tokens", which are found in a text before all other tokens, by id.

    ids      {token: id}
    special  tokens that are not a part of the text
    plain    tokens that are a part of it
    """
    special = set(special)
    return [
        {
            "id": ids[token], "content": token, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": token in special,
        }
        for token in sorted({*special, *plain}, key=ids.__getitem__)
    ]  # fmt: skip


def begins_and_ends(around: Around, ids: Mapping[str, int]) -> JsonObject | None:
    """The post-processor that puts these tokens around every text, or None for no token."""
    tokens = [token for token in around if token is not None]
    if not tokens:
        return None
    begin, end = (
        [{"SpecialToken": {"id": token, "type_id": 0}}] if token is not None else []
        for token in around
    )
    a, b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*begin, a, *end],
        "pair": [*begin, a, *end, b],
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in tokens
        },
    }


def cut_out(pattern: str) -> JsonObject:
    """A pre-tokenizer that makes every match of a regular expression a word of its own."""
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def byte_level(use_regex: bool, prefix_space: bool = False) -> JsonObject:
    """The step that writes bytes as the letters that stand for them, or reads them so.

    use_regex     words are cut by GPT-2's pattern first
    prefix_space  a text gets a space in front
    """
    return {
        "type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": True,
        "use_regex": use_regex,
    }  # fmt: skip


def byte_level_bpe(
    vocab: dict[str, int],
    merges: list[list[str]],
    added: list[JsonObject],
    pre_tokenizer: JsonObject,
    nfc: bool = False,
    around: Around = NOTHING_AROUND,
    ignore_merges: bool = False,
) -> JsonObject:
    """A byte-level BPE like GPT-2's.

    vocab          {token: id}
    merges         pairs of tokens, the first to be merged first
    added          the entries that ``added_tokens`` makes
    pre_tokenizer  cuts a text into words, see ``pre_tokenizers.split``
    nfc            a text is brought to Unicode's normal form C first
    ignore_merges  a word that is itself a token skips the merges
    """
    ids = {**vocab, **{token["content"]: token["id"] for token in added}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": begins_and_ends(around, ids) or byte_level(use_regex=True),
        "decoder": byte_level(use_regex=True),
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
