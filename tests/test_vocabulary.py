"""Vocabularies in their older forms against the libraries that made them."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA
from flashinfer.formats.errors import FormatError
from flashinfer.formats.gguf import GgufFile
from flashinfer.formats.vocabulary import chat_template, gguf_tokenizer, tokenizer_json

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


def test_sentencepiece(sentencepiece_model):
    theirs, folder = sentencepiece_model
    ours = tokenizers.Tokenizer.from_str(tokenizer_json(folder))
    alphabet = "ab c  \n.de日🙂é1_()\t'"
    rng = random.Random(1)
    made = ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(300)]
    code = (DATA.parent / "test_vocabulary.py").read_text()
    for text in [*TEXTS, *made, *code.splitlines()]:
        if "<s>" in text:
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


def test_vocabularies_that_lie():
    base = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b"]}
    assert gguf_tokenizer({}) is None
    for changes in (
        {"tokenizer.ggml.scores": [1.0]}, {"tokenizer.ggml.token_type": ["a", "b"]},
        {"tokenizer.ggml.model": "rwkv"},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b c"]},
    ):  # fmt: skip
        with pytest.raises(FormatError):
            gguf_tokenizer({**base, **changes})


@settings(deadline=None)
@given(data=st.binary(max_size=200))
def test_a_damaged_tokenizer_model_is_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(FormatError, match=r"tokenizer\.model: is not a"):
        tokenizer_json(folder)


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
