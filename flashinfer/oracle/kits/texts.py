"""Tokenizers and chat templates of the kit, and the texts that they are tried on.

The ids and texts that are right were made with the tokenizers and jinja2 libraries and stand in
texts.json, so that a kit can be written without them.
"""

from importlib.resources import files

from flashinfer.formats.bounded_json import JsonObject, parse
from flashinfer.formats.sources.tokenizers import sentencepiece
from flashinfer.formats.sources.tokenizers.parts import Around, added_tokens, byte_level_bpe
from flashinfer.formats.sources.tokenizers.pre_tokenizers import LLAMA3, split
from flashinfer.formats.sources.tokenizers.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    Pieces,
)
from flashinfer.text.text_worker import BYTES, PRINTABLE

SPECIAL = ("<s>", "</s>")
TEXTS = (
    "",
    "a",
    "hello world",
    " leading and trailing ",
    "two  spaces,   three",
    "Don't stop; it's 12345 o'clock.",
    "line\nbreak\r\n\ttab",
    "na\u00efve caf\u00e9 \u2014 \u00fcber",
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "emoji \U0001f600\U0001f468\u200d\U0001f469",
    "a\u0301 combining, \u00a0no-break",
    "<s>special</s> inside",
    "the the the other",
    "\u2581 itself",
    "\x00\x7f control",
)
LETTERS = "abcdefghijklmnopqrstuvwxyzDI.,;'12345"
PARTS = ("th", "he", "er", "in", "an", "re", "ll", "ing", "the")


def byte_level() -> JsonObject:
    """Byte-level BPE with Llama 3's pattern and a token before every text."""
    letters = [chr(code) for code in (*PRINTABLE, *BYTES)]
    space = "\u0120"  # the letter that stands for a space
    merges = [
        ["t", "h"], ["h", "e"], ["e", "r"], ["i", "n"], [space, "th"], [space + "th", "e"],
        ["l", "l"], ["in", "g"], [space, "a"], ["o", "r"], ["1", "2"], ["3", "4"], [space, space],
        ["he", "ll"], ["hell", "o"], ["'", "s"], ["'", "t"], ["\u00c3", "\u00a9"],
    ]  # fmt: skip
    tokens = [*letters, *(a + b for a, b in merges), *SPECIAL]
    vocab = {token: i for i, token in enumerate(tokens)}
    added = added_tokens(vocab, SPECIAL)
    return byte_level_bpe(vocab, merges, added, split((LLAMA3,)), around=Around(SPECIAL[0]))


def byte_fallback() -> JsonObject:
    """SentencePiece's BPE, as Llama 2 has it: what no piece covers becomes bytes."""
    space = sentencepiece.SPACE
    words = [space, *LETTERS, *PARTS, f"{space}th", f"{space}the", f"{space}a", space * 2, "\u00e9"]
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words)]
    scores = [-float(i) for i in range(len(pieces))]
    return sentencepiece.as_json(Pieces(pieces, scores, kinds), Around(SPECIAL[0]))


def unigram() -> JsonObject:
    """SentencePiece's Unigram: the likeliest pieces of a text, and an unknown token."""
    space = sentencepiece.SPACE
    words = [space, *LETTERS, *PARTS, f"{space}the", f"{space}and", "other", "lead", "space"]
    pieces = ["<unk>", *SPECIAL, *words]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * len(words)]
    scores = [0.0, 0.0, 0.0, *(-3.0 - 0.125 * i + 0.5 * len(w) for i, w in enumerate(words))]
    return sentencepiece.as_json(Pieces(pieces, scores, kinds, UNIGRAM), Around(None, SPECIAL[1]))


TOKENIZERS = {
    "byte-level-bpe": byte_level,
    "bpe-with-byte-fallback": byte_fallback,
    "unigram": unigram,
}
CHAT_TOKENIZER = "byte-level-bpe"  # in which every text has ids of its own
TEMPLATES = {
    "chatml": """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "llama2": """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}<<SYS>>{{ message['content'] | trim }}<</SYS>>
{% elif message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]{%- else -%}
 {{ message['content'] | trim }} {{ eos_token }}{% endif %}
{% endfor %}""",
    "whitespace": """\
    {%- set ns = namespace(first=true) -%}
    {%- for message in messages -%}
        {%- if not ns.first %}{{ '\\n---\\n' }}{% endif -%}
        {{- loop.index ~ ': ' ~ message.role | upper ~ ' ' ~ message.content | tojson -}}
        {%- if message.role == 'assistant' %}{% continue %}{% endif -%}
        {%- set ns.first = false -%}
    {%- endfor -%}
""",
}
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello!"}],
    [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "What is\n2 < 3?"},
        {"role": "assistant", "content": " True. "},
        {"role": "user", "content": "Na\u00efve & \"quoted\" \u65e5\u672c\u8a9e {{ x }}"},
    ],
)  # fmt: skip


def expected() -> JsonObject:
    """{"tokenizers": {name: ids of each of TEXTS}, "chats": {name: the text of each of
    CONVERSATIONS}}."""
    path = files("flashinfer.oracle.kits") / "texts.json"
    return parse(path.read_text(encoding="utf-8"), path)


def tokenizer_cases(name: str) -> list[JsonObject]:
    """[{"text", "ids"}] of a tokenizer; ids include the tokens that begin or end every text."""
    pairs = zip(TEXTS, expected()["tokenizers"][name], strict=True)
    return [{"text": text, "ids": ids} for text, ids in pairs]


def chat_cases(name: str) -> list[JsonObject]:
    """[{"messages", "text"}] of a template, which is asked for the beginning of a reply, too."""
    pairs = zip(CONVERSATIONS, expected()["chats"][name], strict=True)
    return [{"messages": messages, "text": text} for messages, text in pairs]
