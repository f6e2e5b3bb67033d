"""Vocabularies in their older forms against the libraries that made them."""

import json
import random
import time
from pathlib import Path

import pytest

from conftest import DATA
from flashinfer.formats.architectures import model_config
from flashinfer.formats.errors import FormatError
from flashinfer.formats.sources.gguf import GgufFile
from flashinfer.formats.sources.tokenizers import sentencepiece
from flashinfer.formats.sources.tokenizers.gguf_vocabulary import gguf_tokenizer
from flashinfer.formats.sources.tokenizers.parts import byte_level_bpe
from flashinfer.formats.sources.tokenizers.pre_tokenizers import GPT2, PATTERNS, QWEN2, split
from flashinfer.formats.sources.tokenizers.vocabulary import chat_template, tokenizer_json
from flashinfer.oracle.kits.configs import gemma4
from flashinfer.oracle.kits.gguf_file import gguf_bytes
from flashinfer.oracle.kits.gguf_form import gguf_metadata

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "The weather is fine.", "", " ", "  two  spaces ", "a\nb\n\n  c\t", "naïve café",
    "日本語の文字", "🙂 and 👩‍👩‍👧", "x = y[3] + 10000", "</s> <s>", "don't WE'LL",
    "\u2581", "_a__b",
]  # fmt: skip


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A BPE with byte fallback, trained as Llama's was."""
    library = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    words = [path.read_text() for path in (DATA.parent).glob("*.py")]
    (folder / "text").write_text("\n".join(words))
    library.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=900,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2, split_digits=True,
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    return library.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), folder


# model, normalization, spaces removed, a space in front, byte fallback, what comes before all else
OPTIONS = [
    ("bpe", "nmt_nfkc", True, True, True, []),
    ("bpe", "nmt_nfkc", True, True, False, []),
    ("bpe", "identity", False, True, True, ["<user>", "<sep>"]),
    ("bpe", "nmt_nfkc", True, False, True, ["<user>"]),
    ("unigram", "nmt_nfkc", True, True, False, []),
    ("unigram", "nmt_nfkc_cf", True, True, True, []),
    ("unigram", "identity", False, True, True, ["<user>", "<sep>"]),
    ("unigram", "nfkc", False, False, True, ["<user>"]),
]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: "-".join(map(str, option[:5])))
def test_sentencepiece_with_every_option(tmp_path, option):
    library = pytest.importorskip("sentencepiece")
    model, rule, remove, prefix, fallback, user = option
    words = DATA.parent.joinpath("conftest.py").read_text()
    (tmp_path / "text").write_text(words + "\n한국어 문장 é ﬁ ½ 日本語 <user>\n" * 20)
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=600,
        minloglevel=2, hard_vocab_limit=False, model_type=model, normalization_rule_name=rule,
        remove_extra_whitespaces=remove, add_dummy_prefix=prefix, byte_fallback=fallback,
        user_defined_symbols=user,
    )  # fmt: skip
    theirs = library.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    ours = tokenizers.Tokenizer.from_str(tokenizer_json(tmp_path))
    # What a map of characters does to a character with a mark is the tokenizers library's own.
    alphabet = [*"ab c  de日1_()\t'ﬁ½ｱ한한é\u3000\u00a0<\n▁", "<user>", "<sep>"]
    alphabet += ["👩‍👧", "e\u0301"] if rule == "identity" else []
    rng = random.Random(2)
    texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 25))) for _ in range(400)]
    for text in [*texts, *words.splitlines()]:
        ids = theirs.encode(text)
        found = ours.encode(text).ids
        if model == "unigram" and found != ids:  # two ways with the same probability
            assert score(theirs, found) == pytest.approx(score(theirs, ids), abs=1e-4), text
        else:
            assert found == ids, text
        if fallback:
            assert ours.decode(ids) == theirs.decode(ids), text


def score(model, ids):
    return sum(model.get_score(i) for i in ids)


def test_sentencepiece_with_tokens_beside_it(sentencepiece_model, tmp_path):
    theirs, folder = sentencepiece_model
    n = theirs.vocab_size()
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": n}))
    settings = {
        "added_tokens_decoder": {str(n + 1): {"content": "<tool>", "special": False},
                                 "1": {"content": "<s>", "special": True}},
        "bos_token": "<s>", "eos_token": "<|im_end|>", "add_eos_token": True, "legacy": False,
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = tokenizers.Tokenizer.from_str(tokenizer_json(tmp_path))
    ids = ours.encode("a<tool>b<|im_end|>").ids
    assert ids == [1, theirs.piece_to_id("▁a"), n + 1, theirs.piece_to_id("b"), n, n]
    assert ours.decode(ids) == "a<tool>b"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"</s>": 5}))
    with pytest.raises(FormatError, match="has two ids"):
        tokenizer_json(tmp_path)


def message(*fields):
    """A protocol buffer of (number, value): bytes, or a number below 128."""
    return b"".join(
        bytes([number << 3, value]) if isinstance(value, int)
        else bytes([number << 3 | 2]) + varint(len(value)) + value
        for number, value in fields
    )  # fmt: skip


def varint(n):
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


BPE = (2, message((3, 2)))


def test_long_pieces_take_time_by_their_length(tmp_path):
    path = tmp_path / "tokenizer.model"
    pieces = [b"ab" * 500_000, b"a" * 200_000, *(b"a" * n for n in range(1, 300))]
    path.write_bytes(message(*[(1, message((1, piece))) for piece in pieces], BPE))
    start = time.monotonic()
    made = json.loads(tokenizer_json(tmp_path))
    assert time.monotonic() - start < 5
    pairs = {tuple(pair) for pair in made["model"]["merges"]}
    short = [piece.decode() for piece in pieces[2:]]
    assert {(a, b) for a in short for b in short if len(a + b) < 300} == pairs
    pieces = [b"a" * n for n in range(1, 1500)]  # a million merges of a thousand letters
    path.write_bytes(message(*[(1, message((1, piece))) for piece in pieces], BPE))
    with pytest.raises(FormatError, match="too many ways"):
        tokenizer_json(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        message((1, message((1, 127))), BPE),  # a number where a text should be
        message((1, message((1, b"a"), (2, 1))), BPE),
        message((1, message((1, b"a"), (3, b"abc"))), BPE),
        message((1, message((1, b"\xff"))), BPE),
        message((1, message((1, b"a"))), (2, 5)),
        message((1, 5), BPE),
        message(BPE),
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"",
    ],
)
def test_a_damaged_tokenizer_model_is_one_line(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(FormatError, match=r"tokenizer\.model: is not a SentencePiece model"):
        tokenizer_json(tmp_path)


@pytest.mark.parametrize(
    "changes, says",
    [
        ((2, message((3, 4))), "kind of model"),
        ((3, message((5, 0))), "how it writes spaces"),
        ((2, message((3, 2)) + b"\xc0\x01\x01"), "how it writes spaces"),
        ((5, message((2, b"abcd"))), "changes the text that it decodes"),
    ],
)
def test_options_that_are_not_supported_are_refused(tmp_path, changes, says):
    (tmp_path / "tokenizer.model").write_bytes(message((1, message((1, b"a"))), BPE, changes))
    with pytest.raises(FormatError, match=says):
        tokenizer_json(tmp_path)


@pytest.mark.parametrize(
    "piece, normalizer, sound",
    [
        (b"USR", message((1, b"nmt_nfkc"), (2, b"x")), True),
        (b"USR", message((1, b"nmt_nfkc_cf"), (2, b"x")), False),
        (b"usr", message((1, b"nmt_nfkc_cf"), (2, b"x")), True),
        ("\u2581\u2581".encode(), message((1, b"identity"), (4, 0)), True),
        ("\u2581\u2581".encode(), message((1, b"identity"), (4, 1)), False),
    ],
)
def test_user_defined_pieces_that_a_normalizer_changes(tmp_path, piece, normalizer, sound):
    pieces = [(1, message((1, b"a"))), (1, message((1, piece), (3, 4)))]
    (tmp_path / "tokenizer.model").write_bytes(message(*pieces, BPE, (3, normalizer)))
    if sound:
        assert tokenizer_json(tmp_path)
        return
    with pytest.raises(FormatError, match="may change its user-defined pieces"):
        tokenizer_json(tmp_path)


def test_sentencepiece(sentencepiece_model):
    theirs, folder = sentencepiece_model
    ours = tokenizers.Tokenizer.from_str(tokenizer_json(folder))
    alphabet = "ab c  \n.de日🙂é1_()\t'"
    rng = random.Random(1)
    made = ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(300)]
    code = Path(__file__).read_text()
    for text in [*TEXTS, *made, *code.splitlines()]:
        if "<s>" in text or "</s>" in text:
            continue  # SentencePiece takes no control token out of a text; tokenizer.json does
        ids = ours.encode(text).ids
        assert ids == [1, *theirs.encode(text)], text
        assert ours.decode(ids) == theirs.decode(ids[1:]), text


def test_sentencepiece_inside_gguf(sentencepiece_model, tmp_path):
    gguf = pytest.importorskip("gguf")
    from make_gguf import write_gguf

    theirs, folder = sentencepiece_model
    kinds = {"is_unknown": 2, "is_control": 3, "is_byte": 6}
    ids = range(theirs.vocab_size())

    def vocabulary(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([theirs.id_to_piece(i) for i in ids])
        writer.add_token_scores([theirs.get_score(i) for i in ids])
        writer.add_token_types(
            [next((k for test, k in kinds.items() if getattr(theirs, test)(i)), 1) for i in ids]
        )
        writer.add_bos_token_id(1)
        writer.add_chat_template("{{ messages }}")

    assert gguf
    path = write_gguf(DATA / "llama-silu", tmp_path / "x.gguf", metadata=vocabulary)
    with GgufFile(path) as file:
        found = gguf_tokenizer(file.metadata)
    assert json.loads(json.dumps(found)) == json.loads(tokenizer_json(folder))


@pytest.mark.parametrize("words", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_bpe_inside_gguf(words):
    """A vocabulary that GGUF holds as tokens and merges gives the ids that its own file gives."""
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator(TEXTS * 3 + [DATA.parent.joinpath("conftest.py").read_text()], 600)
    made = json.loads(inner._tokenizer.to_str())["model"]
    tokens = sorted(made["vocab"], key=made["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in made["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": words,
        "tokenizer.ggml.tokens": [*tokens, "<|end|>"], "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3],
        "tokenizer.ggml.bos_token_id": len(tokens), "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    ours = tokenizers.Tokenizer.from_str(json.dumps(gguf_tokenizer(metadata)))
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids[0] == len(tokens) and ours.decode(ids[1:]) == text
        if words == "gpt-2":
            assert ids[1:] == inner.encode(text).ids
    assert ours.encode("a<|end|>b").ids[2] == len(tokens)
    pieces = ours.encode("12345").tokens[1:]
    assert max(map(len, pieces)) <= {"gpt-2": 5, "llama-bpe": 3, "qwen2": 1}[words]


def test_ranked_pieces_inside_gguf(tmp_path):
    """Gemma 4's vocabulary gives the ids that llama.cpp gives, and the text again."""
    llama_cpp = pytest.importorskip("llama_cpp")
    of_control = [f"<{name}>" for name in ("pad", "eos", "bos", "unk")]
    bytes_and_control = [*of_control, *(f"<0x{i:02X}>" for i in range(256))]
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(byte_fallback=True, unk_token=of_control[-1])
    )
    inner.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=800, special_tokens=bytes_and_control)
    texts = [*TEXTS, DATA.parent.joinpath("conftest.py").read_text(), "\n" * 9, "a\n\nb"]
    inner.train_from_iterator(texts * 9, trainer)
    made = json.loads(inner.to_str())["model"]
    tokens = [*sorted(made["vocab"], key=made["vocab"].get), "<|channel>", "<|turn>"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in made["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [3, 3, 3, 2, *[6] * 256, *[1] * (len(tokens) - 262), 4, 3],
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.add_space_prefix": False,
    }  # fmt: skip
    config = model_config(gemma4(["full_attention"], vocab_size=len(tokens)))
    sizes = {**gguf_metadata("gemma4_text", config, "words"), **metadata}
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(sizes, {}, "f32", exact=()))
    theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
    ours = tokenizers.Tokenizer.from_str(json.dumps(gguf_tokenizer(metadata)))
    for text in [*texts, *Path(__file__).read_text().splitlines(), "<|turn>a\n<|channel>b <eos>"]:
        ids = ours.encode(text).ids
        assert ids == theirs.tokenize(text.encode(), add_bos=True, special=True), text
        if "<" not in text and "\u2581" not in text:
            assert ours.decode(ids) == text
    for merge in ("a", "a b", "\u2581 q\u00e9"):
        with pytest.raises(FormatError, match="merges"):
            gguf_tokenizer({**metadata, "tokenizer.ggml.merges": [*merges, merge]})


def cuts(pre_tokenizer, text):
    return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]


def pre_tokenizer(name):
    made = byte_level_bpe({"a": 0}, [], [], split(PATTERNS[name]))
    return tokenizers.Tokenizer.from_str(json.dumps(made)).pre_tokenizer


LETTERS = "aB cD  'sLL日本한é́12345$+.,!?_\n\r\tﬀ¼ǅ"


@pytest.mark.parametrize("name", PATTERNS)
def test_every_way_to_cut_words_keeps_the_text(name):
    decoder, found = tokenizers.decoders.ByteLevel(), pre_tokenizer(name)
    rng = random.Random(4)
    for _ in range(100):
        text = "".join(rng.choices(LETTERS, k=rng.randint(0, 40)))
        assert decoder.decode(cuts(found, text)) == text


def test_words_are_cut_as_the_models_own_files_cut_them():
    """By parts that the tokenizers library has names for, where their files use those."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split

    theirs = {
        "gpt-2": ByteLevel(add_prefix_space=False),
        "starcoder": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
        "falcon": Sequence(
            [Punctuation("contiguous"), ByteLevel(add_prefix_space=False),
             Split(tokenizers.Regex("[0-9][0-9][0-9]"), "isolated")]
        ),
    }  # fmt: skip
    rng = random.Random(5)
    for name, pre in theirs.items():
        for _ in range(500):
            text = "".join(rng.choices(LETTERS, k=rng.randint(0, 40)))
            assert cuts(pre_tokenizer(name), text) == cuts(pre, text), (name, text)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2TokenizerFast", "CodeGenTokenizer"])
def test_vocab_and_merges_as_transformers_reads_them(name, tmp_path):
    """By the tokenizer's class, with the tokens that only the settings name."""
    transformers = pytest.importorskip("transformers")
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator([*TEXTS, DATA.parent.joinpath("conftest.py").read_text()], 600)
    inner.save_model(str(tmp_path))
    n = inner.get_vocab_size()
    added = {"lstrip": False, "single_word": False, "normalized": False}
    settings = {
        "tokenizer_class": name, "unk_token": "<|end|>", "bos_token": "<|end|>",
        "eos_token": "<|end|>", "add_prefix_space": name == "GPT2Tokenizer",
        "added_tokens_decoder": {
            str(n): {**added, "content": "<|end|>", "rstrip": False, "special": True},
            str(n + 1): {**added, "content": "<tool>", "rstrip": True, "special": False},
        },
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    ours = tokenizers.Tokenizer.from_str(tokenizer_json(tmp_path))
    rng = random.Random(6)
    letters = [*LETTERS, "<|end|>", "<tool>", "e\u0301"]
    made = ["".join(rng.choices(letters, k=rng.randint(0, 40))) for _ in range(300)]
    for text in [*TEXTS, *made]:
        ids = ours.encode(text).ids
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_classes_that_need_more_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    for name in ("CLIPTokenizer", 5):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        with pytest.raises(FormatError, match="tokenizer_class"):
            tokenizer_json(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert json.loads(tokenizer_json(tmp_path))["normalizer"] == {"type": "NFC"}


def test_a_gguf_file_of_an_unknown_tokenizer_is_converted_without(tmp_path, cli):
    pytest.importorskip("gguf")
    from make_gguf import write_gguf

    def vocabulary(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("of-tomorrow")
        writer.add_token_list([f"t{i}" for i in range(96)])
        writer.add_token_merges(["a b"])

    path = write_gguf(DATA / "llama-silu", tmp_path / "x.gguf", metadata=vocabulary)
    code, _, err = cli("convert", path, tmp_path / "x.flash")
    said = [line for line in err.splitlines() if "tokenizer" in line]
    assert code == 0 and len(said) == 1 and "'of-tomorrow', is not known" in said[0]
    code, out, _ = cli("run", tmp_path / "x.flash", "--tokens", "5", "-n", 3)
    assert code == 0 and out.split()
    assert "has no tokenizer" in cli("run", tmp_path / "x.flash", "-p", "a")[2]


def test_vocabularies_that_lie():
    base = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b"]}
    assert gguf_tokenizer({}) is None
    for changes in (
        {"tokenizer.ggml.scores": [1.0]}, {"tokenizer.ggml.token_type": ["a", "b"]},
        {"tokenizer.ggml.model": "rwkv"}, {"tokenizer.ggml.tokens": ["a", "a"]},
        {"tokenizer.ggml.scores": [float("nan"), 1.0]},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "none such"},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
         "tokenizer.ggml.merges": ["a b c"]},
    ):  # fmt: skip
        with pytest.raises(FormatError):
            gguf_tokenizer({**base, **changes})


def test_chat_templates_in_each_form(tmp_path):
    assert chat_template(tmp_path) is None
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "one"}))
    assert chat_template(tmp_path) == "one"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    settings.write_text(json.dumps({"chat_template": several}))
    assert chat_template(tmp_path) == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert chat_template(tmp_path) == "three"


@pytest.mark.parametrize("model_type", ["llama", "falcon", None, 7])
def test_a_tokenizer_of_unknown_words_is_refused(model_type, tmp_path):
    """vocab.json and merges.txt do not say how words are cut."""
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(FormatError, match="no tokenizer_class is named"):
        tokenizer_json(tmp_path)


@pytest.mark.parametrize("model_type, pattern", [("opt", None), ("phi", None), ("qwen2", QWEN2)])
def test_the_model_type_says_how_words_are_cut(model_type, pattern, tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    made = json.loads(tokenizer_json(tmp_path))["pre_tokenizer"]
    assert made == split((pattern or GPT2,))


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_no_numbers(score):
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["?", "b"],
        "tokenizer.ggml.scores": [0.0, score], "tokenizer.ggml.token_type": [2, 1],
    }  # fmt: skip
    with pytest.raises(FormatError, match=r"not 2 numbers|not a finite number"):
        gguf_tokenizer(metadata)
    with pytest.raises(FormatError, match="score is not a finite number"):
        sentencepiece.as_json(sentencepiece.Pieces(["?", "b"], [0.0, score], [2, 1]))
