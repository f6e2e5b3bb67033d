"""Hostile tokenizers, vocabularies and chat templates: each ends in a result or in one line.

python tests/fuzz_text.py --count 5000 [--seed N]
"""

import argparse
import collections
import copy
import json
import random
import tempfile
import time
from pathlib import Path

from text_kinds import KINDS, OfText, byte_level

from flashinfer.formats.errors import UserError
from flashinfer.formats.sources.tokenizers.gguf_vocabulary import gguf_tokenizer
from flashinfer.formats.sources.tokenizers.pre_tokenizers import PATTERNS
from flashinfer.formats.sources.tokenizers.vocabulary import chat_template, tokenizer_json
from flashinfer.plan import memory
from flashinfer.text.tokenizer import TextStream, Tokenizer

SECONDS, BUDGET, GROWTH = 10, 256 << 20, 256 << 20  # of a case; bytes of all; of this process
TEXT = "ab 일é́ <s>\n a.b, don't 12345 \u2581\u2581 " + "a" * 40
STRANGE = [
    None, True, -1, 0, 1, 0.5, 1e300, 1 << 31, 1 << 40, 1 << 63, 1 << 200, "", "a", "\u2581", "\0",
    "\udcff", "a" * 5000, "(a*)*b", "[", "AAAA", [], {}, [[]], [1, 2], ["a", "b"], [["a", "b"]],
    {"type": "Sequence"}, {"type": "Fuse"}, {"type": "ByteLevel"}, {"type": "Strip", "content": "a",
    "start": 1 << 40, "stop": 1 << 40}, {"type": "FixedLength", "length": 0},
    {"type": "Replace", "pattern": {"String": ""}, "content": "ab" * 100},
    {"type": "Replace", "pattern": {"Regex": ""}, "content": "ab" * 100},
    {"type": "Prepend", "prepend": "a" * 1000}, {"type": "Precompiled", "precompiled_charsmap":
    "gAAAAAAAAAA="}, {"type": "Split", "pattern": {"Regex": "\\b"}, "behavior": "Removed",
    "invert": True}, {"type": "CTC", "pad_token": "a", "word_delimiter_token": "", "cleanup": True},
    {"type": "BPEDecoder", "suffix": ""}, {"type": "WordPiece", "prefix": "", "cleanup": True},
    {"type": "Metaspace", "replacement": "a", "prepend_scheme": "always", "split": True},
    {"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0]], "byte_fallback": True},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "q", "type_id": 0}}],
     "pair": [], "special_tokens": {}},
]  # fmt: skip
PIECES = [
    "{{ x }}", "{% for a in range(9999) %}", "{% for a in messages %}", "{% endfor %}",
    "{% if a %}", "{% endif %}", "{{ messages }}", "{{ a.content }}", "{{ 'ab' * 9999999 }}",
    "{{ 9 ** 99999 }}", "{{ 'a'.center(99999999) }}", "{% set a = a ~ a %}", "{% macro m(a) %}",
    "{% endmacro %}", "{{ m(m) }}", "{{ strftime_now('%Y' * 999) }}",
    "{{ raise_exception('no') }}", "{{ ''.__class__ }}", "{{ '%s' % a }}", "{{ a | tojson }}",
    "{{ '\\ud800' }}", "{% break %}", "{{ messages.append(1) }}", "{{ range(10 ** 9) | list }}",
    "{{ cycler(*range(9)) }}", "{{ lipsum(n=9999) }}", "\0", "{%", "}}",
    "{{ namespace(a=namespace).a }}", "{{ (1, 2)[99] }}", "{{ dict(a=1) | urlize }}", "text ",
]  # fmt: skip


def places(value):
    """(container, key) of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


def spoiled(value, rng):
    """A JSON value with some places spoiled: the large lists within seldom, the others often."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2])):
        there = list(places(value))
        if not there:
            break
        small = [(c, k) for c, k in there if len(c) < 30]
        container, key = rng.choice(small if small and rng.random() < 0.8 else there)
        kind = rng.randrange(4)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, list):
            container.insert(key, copy.deepcopy(rng.choice(container)))
        else:
            container[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def damaged(data, rng):
    """Bytes with some of them changed, or cut, or twice there."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0 and data:
            data[at % len(data)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.randint(1, 20)]
        elif kind == 2:
            data[at:at] = data[at // 2 : at]
        else:
            data[at:at] = rng.randbytes(rng.randint(1, 12))
    return bytes(data[: 1 << 20])


def use(folder, text):
    """What becomes of a ``tokenizer.json``: all that a run does with it."""
    tokenizer = Tokenizer(OfText(folder, text), BUDGET + memory.held()[1])
    try:
        ids = tokenizer.encode(TEXT)
        stream = TextStream(tokenizer, ids[:3])
        said = "".join([stream.add(token) for token in ids[3:]]) + stream.end()
        assert tokenizer.decode(ids).endswith(said)
    finally:
        tokenizer.close()


def fuzz_tokenizer(rng, folder):
    text = json.dumps(spoiled(rng.choice(MADE), rng))
    if rng.random() < 0.3:
        text = damaged(text.encode(), rng).decode("utf-8", "surrogateescape")
    use(folder, text)


def fuzz_model(rng, folder):
    """Of SentencePiece's file."""
    data = protobuf(rng)
    (folder / "tokenizer.model").write_bytes(damaged(data, rng) if rng.random() < 0.5 else data)
    use_files(rng, folder)


def protobuf(rng):
    """A ``tokenizer.model`` of a few pieces, whose options are any."""
    words = ["<unk>", "<s>", "<0x41>", *"\u2581ab", "\u2581a", "ab", "a" * rng.randint(1, 999)]
    kinds = [2, 3, 6, *[1] * 5, rng.choice([1, 4, 5])]
    pieces = [
        message((1, word.encode()), (2, rng.randbytes(4)), (3, kind))
        for word, kind in zip(words, kinds, strict=True)
    ]
    trainer = message((3, rng.choice([1, 1, 2, 2, 2, 3])), (24, rng.randrange(9) // 8))
    normalizer = message((2, rng.choice([b"", b"", rng.randbytes(40)])), (3, rng.randint(0, 1)),
                         (4, rng.randint(0, 1)))  # fmt: skip
    return message(*[(1, piece) for piece in pieces], (2, trainer), (3, normalizer))


def message(*fields):
    """A protocol buffer of (number, value): bytes, or numbers."""
    return b"".join(
        varint(number << 3) + varint(value) if isinstance(value, int)
        else varint(number << 3 | (5 if number == 2 and len(value) == 4 else 2))
        + (b"" if number == 2 and len(value) == 4 else varint(len(value))) + value
        for number, value in fields
    )  # fmt: skip


def varint(n):
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def fuzz_merges(rng, folder):
    """``vocab.json``, ``merges.txt`` and what stands beside them."""
    model = byte_level()["model"]
    settings = {
        "tokenizer_class": rng.choice(["GPT2Tokenizer", "Qwen2Tokenizer"]), "bos_token": "<s>",
        "add_bos_token": True, "added_tokens_decoder": {"300": {"content": "<x>", "special": True}},
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    }  # fmt: skip
    files = {
        "vocab.json": model["vocab"], "tokenizer_config.json": settings,
        "added_tokens.json": {"<y>": 301}, "config.json": {"model_type": "qwen2"},
    }  # fmt: skip
    for name, value in files.items():
        value = spoiled(value, rng) if rng.random() < 0.5 else value
        data = json.dumps(value).encode()
        (folder / name).write_bytes(damaged(data, rng) if rng.random() < 0.1 else data)
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"])
    data = merges.encode()
    (folder / "merges.txt").write_bytes(damaged(data, rng) if rng.random() < 0.5 else data)
    chat_template(folder)
    use_files(rng, folder)


def use_files(rng, folder):
    text = tokenizer_json(folder)
    if text is not None and rng.random() < 0.3:
        use(folder, text)


def fuzz_gguf(rng, folder):
    model = byte_level()["model"]
    metadata = {
        "tokenizer.ggml.model": rng.choice(["gpt2", "llama"]),
        "tokenizer.ggml.pre": rng.choice(list(PATTERNS)),
        "tokenizer.ggml.tokens": list(model["vocab"]),
        "tokenizer.ggml.scores": [0.0] * len(model["vocab"]),
        "tokenizer.ggml.token_type": [1] * len(model["vocab"]),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.add_bos_token": True,
        "general.architecture": "llama",
    }  # fmt: skip
    for key in rng.sample(sorted(metadata), 2):
        value = metadata[key]
        if isinstance(value, list):  # of one kind of things, as such a file has them
            value = value[: rng.randrange(len(value) + 1)] if rng.random() < 0.5 else value
            metadata[key] = [rng.choice([type(value[0])(), *value]) for _ in value] or value
        else:
            metadata[key] = rng.choice([None, "", "a", 5, -1, 1.5, True, ["a"], [1], [0.5]])
    made = gguf_tokenizer(metadata)
    if made is not None and rng.random() < 0.3:
        use(folder, json.dumps(made))


def fuzz_template(rng, folder):
    source = "".join(rng.choices(PIECES, k=rng.randint(1, 12)))
    if rng.random() < 0.2:
        source = damaged(source.encode("utf-8", "replace"), rng).decode("utf-8", "replace")
    tokenizer = Tokenizer(OfText(folder, json.dumps(MADE[0])), BUDGET + memory.held()[1])
    try:
        tokenizer.use_template(source)
        messages = json.dumps([{"role": "user", "content": TEXT}]).encode()
        special = {"bos_token": 1, "eos_token": None}
        tokenizer.ask("render", messages, 100, special=special, characters_at_most=10_000)
    finally:
        tokenizer.close()


MADE = [make() for make in KINDS.values()]
FUZZERS = {
    "tokenizer.json": fuzz_tokenizer, "tokenizer.model": fuzz_model,
    "vocab and merges": fuzz_merges, "gguf": fuzz_gguf, "template": fuzz_template,
}  # fmt: skip


def run(kind, seed):
    """One case; "accepted", or the reason why not. Raises whatever is no one-line error."""
    begun = memory.peak_rss()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        try:
            FUZZERS[kind](random.Random(f"{kind} {seed}"), Path(folder))
            result = "accepted"
        except UserError as error:
            result = str(error)
            assert result and result.isprintable(), result
        assert time.monotonic() - start < SECONDS, f"{kind} {seed} took too long"
    assert memory.peak_rss() < begun + GROWTH, f"{kind} {seed} took too much memory"
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    args = parser.parse_args()
    for kind in FUZZERS:
        start, slowest, results = time.monotonic(), 0.0, collections.Counter()
        for seed in range(args.seed, args.seed + args.count):
            begun = time.monotonic()
            try:
                results["accepted" if run(kind, seed) == "accepted" else "refused"] += 1
            except BaseException:
                print(f"{kind} {seed}:")
                raise
            slowest = max(slowest, time.monotonic() - begun)
        print(f"{kind}: {args.count} cases, {dict(results)}, slowest {slowest:.1f} s, "
              f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
