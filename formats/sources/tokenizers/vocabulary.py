"""A checkpoint's tokenizer, in whichever form it comes, as the text of a ``tokenizer.json``.

``tokenizer.json`` itself; ``vocab.json`` and ``merges.txt`` (GPT-2, OPT, Qwen 2); SentencePiece's
``tokenizer.model`` (Llama 2, Mistral). What stands beside them, in ``tokenizer_config.json`` and
``added_tokens.json``, is part of it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ... import bounded_json
from ...bounded_json import JsonObject, read_json
from ...errors import FormatError, shown
from ...files import read_text
from ...numbers import is_whole
from . import sentencepiece
from .parts import Around, added_tokens, byte_level_bpe
from .pre_tokenizers import GPT2, QWEN2, split

MOST_TOKENIZER = 1 << 30  # bytes of memory; 260,000 tokens with their merges take half of it
# transformers' tokenizer classes with vocab.json and merges.txt -> (the patterns that cut words,
# whether texts are brought to normal form C first)
CLASSES = {
    "PreTrainedTokenizer": ((GPT2,), False),
    "GPT2Tokenizer": ((GPT2,), False),
    "CodeGenTokenizer": ((GPT2,), False),
    "Qwen2Tokenizer": ((QWEN2,), True),
}
OF_MODEL_TYPE = {  # the class where tokenizer_config.json names none
    "opt": "GPT2Tokenizer", "phi": "CodeGenTokenizer",
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), "Qwen2Tokenizer"),
}  # fmt: skip


ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokenizer_json(directory: Path) -> str | None:
    """The text of ``tokenizer.json``, or one made of the older files in a directory, or None."""
    path = directory / "tokenizer.json"
    if path.exists():
        text = read_text(path)
        if not isinstance(bounded_json.parse(text, path, MOST_TOKENIZER, finite=True), dict):
            raise FormatError(f"{path}: not a JSON object")
        return text
    settings = _settings(directory)
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        return json.dumps(_byte_level(directory, settings))
    if (directory / "tokenizer.model").exists():
        return json.dumps(_sentencepiece(directory, settings))
    return None


def chat_template(directory: Path) -> str | None:
    """The jinja template of a conversation, or None."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    template = _settings(directory).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return template if isinstance(template, str) else None


def special_tokens(directory: Path) -> dict[str, str]:
    """{role: token} of the special tokens that a tokenizer names; "" where a role has no token."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        for role, entry in (read_json(path) if path.exists() else {}).items():
            token = _text_of(entry)
            if role in ROLES and isinstance(token, str | None):
                found[role] = token or ""
    return found


def _text_of(entry: Any) -> Any:
    """A token's text; the files have either that or an object with its "content"."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _byte_level(directory: Path, settings: JsonObject) -> JsonObject:
    """The ``tokenizer.json`` made of ``vocab.json`` and ``merges.txt``."""
    vocab = ids_of(read_json(directory / "vocab.json", MOST_TOKENIZER), directory / "vocab.json")
    merges = _read_merges(directory / "merges.txt")
    patterns, nfc = CLASSES[_class(directory, settings)]
    added, around = _beside(directory, settings, vocab)
    prefix_space = settings.get("add_prefix_space") is True
    return byte_level_bpe(vocab, merges, added, split(patterns, prefix_space), nfc, around)


def _class(directory: Path, settings: JsonObject) -> str:
    """The tokenizer's class, one of CLASSES. Raises FormatError where it is another."""
    name = settings.get("tokenizer_class")
    if name is None and (directory / "config.json").exists():
        model_type = read_json(directory / "config.json").get("model_type")
        name = OF_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    name = name.removesuffix("Fast") if isinstance(name, str) else name
    if not isinstance(name, str) or name not in CLASSES:
        what = "no tokenizer_class is named, and none is known for the model_type"
        if name is not None:
            what = f"the tokenizer_class {shown(name)} is not supported in this form"
        raise FormatError(
            f"{directory / 'tokenizer_config.json'}: {what}; save the tokenizer as tokenizer.json"
        )
    return name


def _read_merges(path: Path) -> list[list[str]]:
    lines = read_text(path).split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    return pairs_of((line.rstrip("\r") for line in lines if line.strip("\r")), path)


def pairs_of(lines: Iterable[str], name: Path | str) -> list[list[str]]:
    """Merges as pairs of tokens. Raises FormatError, naming ``name``, where a line is no pair."""
    pairs = [line.split(" ") for line in lines]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise FormatError(f"{name}: a line is not two tokens separated by a space")
    return pairs


def ids_of(vocab: JsonObject, path: Path) -> dict[str, int]:
    """``vocab`` once it is checked. Raises FormatError where it does not give each token an id."""
    ids = vocab.values()
    if not all(is_whole(i, 0, (1 << 31) - 1) for i in ids) or len(set(ids)) < len(ids):
        raise FormatError(f"{path}: does not give each token a number of its own")
    return vocab


def _sentencepiece(directory: Path, settings: JsonObject) -> JsonObject:
    """The ``tokenizer.json`` made of ``tokenizer.model``."""
    path = directory / "tokenizer.model"
    pieces = sentencepiece.read(path)
    ids = {piece: i for i, piece in enumerate(pieces.pieces)}
    added, around = _beside(directory, settings, ids, "<s>")
    plain = pieces.of_kind(sentencepiece.USER_DEFINED)  # found without being added
    space = settings.get("add_prefix_space")
    pieces = replace(
        pieces,
        added=[token for token in added if token["special"] or token["content"] not in plain],
        space_first=pieces.space_first if space is None else space is True,
    )
    try:
        return sentencepiece.as_json(pieces, around, settings.get("legacy") is False)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def _settings(directory: Path) -> JsonObject:
    """tokenizer_config.json, or {} where there is none."""
    path = directory / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


class _Entry(NamedTuple):
    """A token beside the vocabulary: its id, and its other settings."""

    id: int
    settings: JsonObject


def _beside(
    directory: Path, settings: JsonObject, vocab: Mapping[str, int], bos: str | None = None
) -> tuple[list[JsonObject], Around]:
    """(the entries of "added_tokens" for the tokens beside a vocabulary, the tokens around a text).

    bos  the token that texts begin with where the settings do not say, or None
    """
    ids, special, entries = dict(vocab), set(), _entries(directory, settings)
    for token, entry in entries.items():
        if ids.setdefault(token, entry.id) != entry.id:
            raise FormatError(f"{directory}: the token {shown(token)} has two ids")
        if entry.settings.get("special", False):
            special.add(token)
    roles = _special_tokens(settings, ids)
    special.update(roles.values())
    tokens = added_tokens(ids, special, entries)
    for made in tokens:
        own = entries[made["content"]].settings if made["content"] in entries else {}
        made.update({key: own[key] for key in made if isinstance(own.get(key), bool)})
        made["special"] = made["content"] in special
    first, last = roles.get("bos_token", bos), roles.get("eos_token")
    if first not in ids or not settings.get("add_bos_token", bos is not None):
        first = None
    return tokens, Around(first, last if settings.get("add_eos_token") else None)


def _entries(directory: Path, settings: JsonObject) -> dict[str, _Entry]:
    """{token: its _Entry} of added_tokens.json and tokenizer_config.json."""
    path = directory / "added_tokens.json"
    found = {}
    if path.exists():
        found = {token: _Entry(i, {}) for token, i in ids_of(read_json(path), path).items()}
    listed = settings.get("added_tokens_decoder", {})
    for number, entry in listed.items() if isinstance(listed, dict) else ():
        token = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(token, str) or not (number.isdecimal() and len(number) < 10):
            raise FormatError(
                f"{directory / 'tokenizer_config.json'}: added_tokens_decoder is not tokens by id"
            )
        found[token] = _Entry(int(number), entry)
    return {token: entry for token, entry in found.items() if token}


def _special_tokens(settings: JsonObject, ids: Mapping[str, int]) -> dict[str, str]:
    """{role: token} of the special tokens that tokenizer_config.json names."""
    more = settings.get("additional_special_tokens")
    more = more if isinstance(more, list) else []
    named = {role: settings.get(role) for role in ROLES}
    named.update({f"additional {n}": entry for n, entry in enumerate(more)})
    texts = {role: _text_of(entry) for role, entry in named.items()}
    return {role: text for role, text in texts.items() if isinstance(text, str) and text in ids}
