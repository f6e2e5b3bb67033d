"""A checkpoint's tokenizer, in whichever form it comes, as the text of a ``tokenizer.json``.

``tokenizer.json`` itself; ``vocab.json`` and ``merges.txt`` (GPT-2, OPT); SentencePiece's
``tokenizer.model`` (Llama 2, Mistral); the vocabularies inside GGUF files.
"""

import json
import struct
from pathlib import Path

from . import bounded_json
from .errors import FormatError
from .files import read_bytes

MOST_TOKENIZER = 1 << 30  # bytes of memory; 260,000 tokens with their merges take half of it
# SentencePiece's kinds of pieces, which GGUF took over.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# How byte-level BPEs cut a text into words, by the name that GGUF gives it; "" is GPT-2's.
WORDS = {
    "": "",
    "default": "",
    "gpt-2": "",
    "phi-2": "",
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def tokenizer_json(directory):
    """The text of ``tokenizer.json``, or one made of the older files in a directory, or None."""
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if path.exists():
        read_json(path, MOST_TOKENIZER)
        return path.read_text(encoding="utf-8")
    settings = _settings(directory)
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        vocab = read_json(directory / "vocab.json", MOST_TOKENIZER)
        lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        if any(len(pair) != 2 for pair in merges):
            raise FormatError(f"{directory / 'merges.txt'}: not one pair of tokens a line")
        special = _special_tokens(settings, vocab)
        first = special.get("bos_token") if settings.get("add_bos_token") else None
        return json.dumps(byte_level_bpe(vocab, merges, set(special.values()), first))
    path = directory / "tokenizer.model"
    if path.exists():
        return json.dumps(_sentencepiece_file(path, settings))
    return None


def chat_template(directory):
    """The jinja template of a conversation, or None."""
    directory = Path(directory)
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = _settings(directory).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def read_json(path, most=bounded_json.MOST):
    """A JSON object from a file, which may take ``most`` bytes of memory. Raises FormatError,
    naming the file, where that is not what it holds."""
    if not path.exists():
        raise FormatError(f"{path}: does not exist")
    value = bounded_json.parse(read_bytes(path), path, most)
    if not isinstance(value, dict):
        raise FormatError(f"{path}: not a JSON object")
    return value


def byte_level_bpe(vocab, merges, special, first=None, words="", ignore_merges=False):
    """GPT-2's byte-level BPE as a ``tokenizer.json`` (a dict).

    vocab    {token: id}; merges: pairs of tokens; special: tokens that are no text
    first    the token that every text begins with, or None
    words    a regular expression that cuts a text into words; "": GPT-2's
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    pre_tokenizer = {**byte_level, "use_regex": True}
    if words:
        split = {
            "type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False,
        }  # fmt: skip
        pre_tokenizer = {
            "type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}],
        }  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(vocab, special),
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _begins_with(first, vocab) or {**byte_level, "use_regex": True},
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip


def sentencepiece(pieces, scores, kinds, first=None, space_first=True):
    """A SentencePiece BPE as a ``tokenizer.json`` (a dict).

    SentencePiece joins the two neighbours whose piece has the highest score, so its merges are
    all pairs of pieces that make a piece, by that piece's score.

    pieces, scores, kinds  of each id; first: the token that every text begins with, or None
    space_first            every text gets a space in front
    """
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        if kind in (NORMAL, USER_DEFINED) and len(piece) > 1:
            pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            known = [(a, b) for a, b in pairs if a in vocab and b in vocab]
            known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
            merges += [(score, pair) for pair in known]
    merges.sort(key=lambda scored: -scored[0])
    unknown = next((p for p, kind in zip(pieces, kinds, strict=True) if kind == UNKNOWN), None)
    special = {p for p, k in zip(pieces, kinds, strict=True) if k in (UNKNOWN, CONTROL)}
    normalizers = [{"type": "Prepend", "prepend": "\u2581"}] if space_first else []
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"})
    decoders = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if space_first:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(vocab, special),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": _begins_with(first, vocab),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": True, "ignore_merges": False, "vocab": vocab,
            "merges": [pair for _, pair in merges],
        },
    }  # fmt: skip


def gguf_tokenizer(metadata):
    """The tokenizer of a GGUF file's metadata as a ``tokenizer.json`` (a dict), or None.

    Raises FormatError where it is damaged, or of a kind that is not known.
    """
    model, tokens = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "tokens"))
    if not isinstance(tokens, list) or model in (None, "no_vocab", "none"):
        return None
    kinds = _numbers(metadata, "token_type", len(tokens), NORMAL)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    wants = metadata.get("tokenizer.ggml.add_bos_token", model == "llama")
    first = tokens[bos] if wants and isinstance(bos, int) and 0 <= bos < len(tokens) else None
    if model == "llama":
        scores = _numbers(metadata, "scores", len(tokens), 0.0)
        space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        return sentencepiece(tokens, scores, kinds, first, space)
    words = metadata.get("tokenizer.ggml.pre", "")
    if model != "gpt2" or words not in WORDS:
        raise FormatError(f"its tokenizer, {str(model)[:20]} {str(words)[:20]}, is not known")
    merges = metadata.get("tokenizer.ggml.merges")
    merges = [merge.split(" ") for merge in merges] if isinstance(merges, list) else []
    if any(len(pair) != 2 for pair in merges):
        raise FormatError("tokenizer.ggml.merges is not a list of pairs")
    vocab = {token: i for i, token in enumerate(tokens)}
    special = {t for t, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)}
    return byte_level_bpe(vocab, merges, special, first, WORDS[words], words == "llama-bpe")


def _numbers(metadata, key, n, default):
    values = metadata.get(f"tokenizer.ggml.{key}")
    values = [default] * n if values is None else list(values)
    if len(values) != n or not all(hasattr(v, "__float__") for v in values):
        raise FormatError(f"tokenizer.ggml.{key} is not {n} numbers")
    return [v.item() if hasattr(v, "item") else v for v in values]


def _settings(directory):
    path = Path(directory) / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _special_tokens(settings, vocab):
    """{role: token} of the special tokens that tokenizer_config.json names."""
    found = {}
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocab:
            found[role] = token
    return found


def _added(vocab, special):
    return [
        {
            "id": vocab[token], "content": token, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }
        for token in sorted(special, key=vocab.get)
    ]  # fmt: skip


def _begins_with(first, vocab):
    """The post-processor that puts this token in front of every text."""
    if first is None:
        return None
    begin, a, b = ({"SpecialToken": {"id": first, "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}},
                   {"Sequence": {"id": "B", "type_id": 1}})  # fmt: skip
    return {
        "type": "TemplateProcessing",
        "single": [begin, a],
        "pair": [begin, a, b],
        "special_tokens": {first: {"id": first, "ids": [vocab[first]], "tokens": [first]}},
    }


# ---------------------------------------------------------------- SentencePiece's own file


def _sentencepiece_file(path, settings):
    """A ``tokenizer.model`` as a ``tokenizer.json`` (a dict).

    The file is a protocol buffer: ModelProto in sentencepiece_model.proto, of which the pieces
    (1: text 1, score 2, kind 3), the trainer's model_type (2: 3) and the normalizer's
    add_dummy_prefix (3: 3) are needed.
    """
    pieces, scores, kinds, bpe, space_first = [], [], [], False, True
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == 1:
                piece = dict(_fields(value))
                pieces.append(bytes(piece[1]).decode("utf-8"))
                scores.append(_float(piece.get(2, b"\0\0\0\0")))
                kinds.append(piece.get(3, NORMAL))
            elif number == 2:
                bpe = dict(_fields(value)).get(3, 1) == 2
            elif number == 3:
                space_first = bool(dict(_fields(value)).get(3, 1))
    except (ValueError, KeyError, IndexError, TypeError, struct.error):
        raise FormatError(f"{path}: is not a SentencePiece model") from None
    if not bpe:
        raise FormatError(f"{path}: is not a BPE model; save the tokenizer as tokenizer.json")
    special = _special_tokens(settings, dict.fromkeys(pieces))
    first = special.get("bos_token", "<s>") if settings.get("add_bos_token", True) else None
    return sentencepiece(pieces, scores, kinds, first if first in pieces else None, space_first)


def _fields(data):
    """Yield (number, value) of a protocol buffer's message: integers, or views of the bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        else:
            length, at = (8, at) if kind == 1 else (4, at) if kind == 5 else _varint(data, at)
            if kind not in (1, 2, 5) or length > len(data) - at:
                raise ValueError("cut")
            value, at = data[at : at + length], at + length
        yield key >> 3, value


def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("too long")


def _float(raw):
    return struct.unpack("<f", raw)[0]
