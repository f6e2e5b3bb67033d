"""A checkpoint's tokenizer, in whichever form it comes, as the text of a ``tokenizer.json``.

``tokenizer.json`` itself; ``vocab.json`` and ``merges.txt`` (GPT-2, OPT, Qwen 2); SentencePiece's
``tokenizer.model`` (Llama 2, Mistral). What stands beside them, in ``tokenizer_config.json`` and
``added_tokens.json``, is part of it.
"""

import json
from dataclasses import replace
from pathlib import Path

from ... import bounded_json
from ...bounded_json import read_json
from ...errors import FormatError, shown
from ...files import read_text
from ...numbers import is_whole
from . import sentencepiece
from .parts import added_tokens, byte_level_bpe
from .pre_tokenizers import GPT2, QWEN2, split

MOST_TOKENIZER = 1 << 30  # bytes of memory; 260,000 tokens with their merges take half of it
# Classes of transformers with vocab.json and merges.txt -> (patterns, normal form C first)
CLASSES = {
    "PreTrainedTokenizer": ((GPT2,), False),
    "GPT2Tokenizer": ((GPT2,), False),
    "CodeGenTokenizer": ((GPT2,), False),
    "Qwen2Tokenizer": ((QWEN2,), True),
}
OF_MODEL_TYPE = {  # where tokenizer_config.json names no class
    "opt": "GPT2Tokenizer", "phi": "CodeGenTokenizer",
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), "Qwen2Tokenizer"),
}  # fmt: skip


ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokenizer_json(directory):
    """The text of ``tokenizer.json``, or one made of the older files in a directory, or None."""
    directory = Path(directory)
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


def chat_template(directory):
    """The jinja template of a conversation, or None."""
    directory = Path(directory)
    path = directory / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    template = _settings(directory).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return template if isinstance(template, str) else None


def special_tokens(directory):
    """{role: token} of the special tokens that a tokenizer names; "" where it has none."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = Path(directory) / name
        for role, token in (read_json(path) if path.exists() else {}).items():
            token = token.get("content") if isinstance(token, dict) else token
            if role in ROLES and isinstance(token, str | None):
                found[role] = token or ""
    return found


def _byte_level(directory, settings):
    """``vocab.json`` and ``merges.txt`` as a ``tokenizer.json`` (a dict)."""
    vocab = ids_of(read_json(directory / "vocab.json", MOST_TOKENIZER), directory / "vocab.json")
    merges = _read_merges(directory / "merges.txt")
    patterns, nfc = CLASSES[_class(directory, settings)]
    added, around = _beside(directory, settings, vocab)
    prefix_space = settings.get("add_prefix_space") is True
    return byte_level_bpe(vocab, merges, added, split(patterns, prefix_space), nfc, around)


def _class(directory, settings):
    """The tokenizer's class, where it is one that is known. Raises FormatError."""
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


def _read_merges(path):
    lines = read_text(path).split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    return pairs_of((line.rstrip("\r") for line in lines if line.strip("\r")), path)


def pairs_of(lines, name):
    """Merges as pairs of tokens. Raises FormatError where a line is not two tokens."""
    pairs = [line.split(" ") for line in lines]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise FormatError(f"{name}: a line is not two tokens separated by a space")
    return pairs


def ids_of(vocab, path):
    """{token: id}, as it was read. Raises FormatError where the ids are not whole numbers."""
    ids = vocab.values()
    if not all(is_whole(i, 0, (1 << 31) - 1) for i in ids) or len(set(ids)) < len(ids):
        raise FormatError(f"{path}: is not tokens with an id each")
    return vocab


def _sentencepiece(directory, settings):
    """``tokenizer.model`` as a ``tokenizer.json`` (a dict)."""
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
        return sentencepiece.as_json(pieces, *around, settings.get("legacy") is False)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def _settings(directory):
    path = Path(directory) / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _beside(directory, settings, vocab, bos=None):
    """(tokens that stand beside a vocabulary, as "added_tokens" has them; the tokens that a text
    begins and ends with).

    bos  the token that texts begin with where nothing says otherwise, or None
    """
    ids, special, entries = dict(vocab), set(), _entries(directory, settings)
    for token, (number, entry) in entries.items():
        if ids.setdefault(token, number) != number:
            raise FormatError(f"{directory}: the token {shown(token)} has two ids")
        if entry.get("special", False):
            special.add(token)
    roles = _special_tokens(settings, ids)
    special.update(roles.values())
    tokens = added_tokens(ids, special, entries)
    for token in tokens:
        entry = entries.get(token["content"], (0, {}))[1]
        token.update({key: entry[key] for key in token if isinstance(entry.get(key), bool)})
        token["special"] = token["content"] in special
    first, last = roles.get("bos_token", bos), roles.get("eos_token")
    if first not in ids or not settings.get("add_bos_token", bos is not None):
        first = None
    return tokens, (first, last if settings.get("add_eos_token") else None)


def _entries(directory, settings):
    """{token: (id, what else is said of it)} of added_tokens.json and tokenizer_config.json."""
    path, found = directory / "added_tokens.json", {}
    if path.exists():
        found = {token: (i, {}) for token, i in ids_of(read_json(path), path).items()}
    listed = settings.get("added_tokens_decoder", {})
    for number, entry in listed.items() if isinstance(listed, dict) else ():
        token = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(token, str) or not (number.isdecimal() and len(number) < 10):
            raise FormatError(
                f"{directory / 'tokenizer_config.json'}: added_tokens_decoder is not tokens by id"
            )
        found[token] = (int(number), entry)
    return {token: entry for token, entry in found.items() if token}


def _special_tokens(settings, ids):
    """{role: token} of the special tokens that tokenizer_config.json names."""
    found = {}
    for role in ROLES:
        token = settings.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            found[role] = token
    more = settings.get("additional_special_tokens", [])
    for n, token in enumerate(more if isinstance(more, list) else []):
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            found[f"additional {n}"] = token
    return found
