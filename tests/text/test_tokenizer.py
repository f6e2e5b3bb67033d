"""Text to tokens and back: the stream, the library's own decoding, limits and hostile files."""

import contextlib
import io
import json
import os
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.plan import memory
from flashinfer.text import worker
from flashinfer.text.tokenizer import TextStream, Tokenizer

tokenizers = pytest.importorskip("tokenizers")

from text_kinds import KINDS, OfText, byte_level, made  # noqa: E402

LOST = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text("일본어 가나다라마바사", max_size=60),
    st.text("👩‍👧é́ ab.,' n<s>", max_size=60),
    st.lists(st.sampled_from(["👩‍👩‍👧", "é́̂", "</s>", "  ", "일", "a", "ab"]), max_size=30).map(
        "".join
    ),
)


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request, tmp_path_factory):
    """(our Tokenizer, the library's) of each kind."""
    text = json.dumps(KINDS[request.param]())
    ours = Tokenizer(OfText(tmp_path_factory.mktemp("kind"), text))
    yield ours, tokenizers.Tokenizer.from_str(text)
    ours.close()


def sound(theirs, ids):
    """Whether byte tokens, where there are any, are UTF-8: else the library replaces whole runs."""
    decoder = json.loads(theirs.to_str())["decoder"] or {}
    return "ByteFallback" not in json.dumps(decoder) or LOST not in theirs.decode(ids)


def streamed(tokenizer, ids, context=()):
    stream = TextStream(tokenizer, context)
    return [*(stream.add(token) for token in ids), stream.end()]


@settings(deadline=None)
@given(text=TEXTS, data=st.data())
def test_a_stream_says_the_whole_text_whatever_the_prompt(kind, text, data):
    ours, theirs = kind
    ids = ours.encode(text)
    assert ids == theirs.encode(text).ids
    pieces = streamed(ours, ids)
    whole = ours.decode(ids)
    assert "".join(pieces) == whole
    if sound(theirs, ids):
        assert whole == theirs.decode(ids)
        assert LOST in whole or not any(LOST in piece for piece in pieces)
    cut = data.draw(st.integers(0, len(ids)))
    check_continued(ours, ids[:cut], ids[cut:])


@settings(deadline=None)
@given(data=st.data())
def test_any_tokens_are_streamed_as_they_are_decoded(kind, data):
    """Also bytes that are no UTF-8, special tokens within characters, and ids that are none."""
    ours, theirs = kind
    n = len(ours.silent)
    token = st.one_of(st.integers(0, n + 2), st.integers(max(0, n - 8), n - 1), st.integers(3, 258))
    prompt = data.draw(st.lists(token, max_size=12))
    ids = data.draw(st.lists(token, max_size=40))
    if sound(theirs, prompt + ids):
        assert ours.decode(prompt + ids) == theirs.decode(prompt + ids)
    check_continued(ours, prompt, ids)


def check_continued(tokenizer, prompt, ids):
    """What a stream yields after a prompt is the rest of the whole text."""
    stream = TextStream(tokenizer)
    begun = "".join(stream.add(token) for token in prompt)
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    assert before.startswith(begun) and set(before[len(begun) :]) <= {LOST}
    continued = "".join(streamed(tokenizer, ids, prompt))
    assert begun + continued == whole
    if before == begun:
        assert continued == whole[len(before) :]


def test_streams_of_bytes_longer_than_any_window(kind):
    ours, theirs = kind
    text = "가나다라마바사👩‍👧é́" * 60
    ids = theirs.encode(text, add_special_tokens=False).ids
    for cut in range(0, min(len(ids), 40)):
        assert "".join(streamed(ours, ids[cut:], ids[:cut])) == theirs.decode(ids)[
            len("".join(streamed(ours, ids[:cut])).rstrip(LOST)) :
        ]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    found = Tokenizer(OfText(tmp_path_factory.mktemp("bytes"), json.dumps(byte_level())))
    yield found
    found.close()


def test_half_a_character_at_the_end_is_not_lost(tokenizer):
    assert streamed(tokenizer, tokenizer.encode("é")[:1]) == ["", LOST]


def test_a_token_costs_the_same_at_any_length(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("일é" * 8000)
    start = time.perf_counter()
    for token in ids:
        stream.add(token)
    assert (time.perf_counter() - start) / len(ids) < 200e-6


def test_no_more_is_tokenized_than_shows_that_it_is_too_much(tokenizer):
    class Counting(io.StringIO):
        taken = 0

        def read(self, n):
            found = super().read(n)
            self.taken += len(found)
            return found

    text = Counting("word " * 1_000_000)
    ids, whole = tokenizer.encode_up_to(1000, text.read)
    assert not whole and len(ids) > 1000 and text.taken < 20_000
    assert tokenizer.encode_up_to(1000, io.StringIO("ab").read) == (tokenizer.encode("ab"), True)
    assert tokenizer.encode_up_to(3, io.StringIO("").read) == ([], True)


def test_a_text_that_is_not_utf8_is_refused(tokenizer):
    with pytest.raises(UserError, match="is not UTF-8"):
        tokenizer.encode(os.fsdecode(b"a\xff"))


def test_no_tokenizer(plain):
    with Bundle(plain) as bundle, pytest.raises(UserError, match="--tokens"):
        Tokenizer(bundle)


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install"):
        Tokenizer(OfText(tmp_path, "{}"))


def test_the_process_ends_and_leaves_nothing(tmp_path):
    found = Tokenizer(OfText(tmp_path, json.dumps(byte_level())))
    process = found.worker.process
    assert memory.helpers.keys() >= {process.pid} and memory.rss() > memory.held()[1]
    found.close()
    assert process.returncode is not None and process.pid not in memory.helpers
    assert found.encode("ab") and found.worker.process.pid != process.pid  # started anew
    pid = found.worker.process.pid
    del found
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_threads_may_be_there(tmp_path):
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    try:
        found = Tokenizer(OfText(tmp_path, json.dumps(byte_level())))
        assert found.decode(found.encode("ab")) == "ab"
        found.close()
    finally:
        event.set()
        thread.join()


# ---------------------------------------------------------------- hostile files


def spoiled(**changes):
    return json.dumps({**byte_level(), **changes})


PADDING = {
    "strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
    "pad_type_id": 0, "pad_token": "[PAD]",
}  # fmt: skip
TRUNCATION = {
    "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
}  # fmt: skip


def replacing(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def expanding(n):
    return {"type": "Sequence", "normalizers": [replacing({"String": "a"}, "a" * 50)] * n}


HOSTILE = {
    "nothing": "",
    "another kind of thing": '{"model": 3}',
    "a lone surrogate": '"\ud800"',
    "deep": "[" * 100_000,
    "expanding": spoiled(normalizer=expanding(20)),
    "words of no letters": spoiled(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "no such map": spoiled(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a map beyond its end": spoiled(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w==" + "A" * 8}
    ),
    "an id beyond all": json.dumps(
        {**byte_level(), "model": {**byte_level()["model"], "vocab": {"a": 4294967295}}}
    ).replace('["a", "b"], ["\\u0120", "ab"]', ""),
    "an expanding decoder": spoiled(
        decoder={"type": "Sequence", "decoders": [replacing({"String": "a"}, "a" * 100)] * 9}
    ),
    "a decoder by patterns": spoiled(decoder=replacing({"Regex": "(a*)*$"}, "b")),
    "a template without its token": spoiled(
        post_processor={"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "none", "type_id": 0}}], "pair": [], "special_tokens": {}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tokenizer_is_one_line_in_time(tmp_path, text):
    start = time.monotonic()
    with pytest.raises(UserError) as raised:
        found = Tokenizer(OfText(tmp_path, text), budget=1 << 30)
        found.encode("a" * 40 + " b")
    assert "\n" not in str(raised.value) and "x.flash: " in str(raised.value)
    assert time.monotonic() - start < 10


def test_requests_that_make_one_answer_share_their_seconds(tokenizer, monkeypatch):
    monkeypatch.setattr(worker, "SECONDS", 0.5)
    tokenizer.begin()
    start = time.monotonic()
    with pytest.raises(UserError, match="seconds"):
        tokenizer.encode_up_to(10**9, lambda n: "ab" * (n // 2))
    assert time.monotonic() - start < 2
    assert tokenizer.encode("ab")  # has seconds of its own


def test_a_slow_pattern_ends_in_time(tmp_path):
    slow = {
        "type": "Split", "pattern": {"Regex": "(a*)*(a*)*(a*)*$x"}, "behavior": "Isolated",
        "invert": False,
    }  # fmt: skip
    start = time.monotonic()
    found = Tokenizer(OfText(tmp_path, spoiled(pre_tokenizer=slow)), budget=1 << 30)
    with contextlib.suppress(UserError):
        found.encode("a" * 40 + " b")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "changes", [{"padding": PADDING}, {"truncation": TRUNCATION}], ids=["padding", "truncation"]
)
def test_padding_and_truncation_are_not_a_texts(tmp_path, changes):
    found = Tokenizer(OfText(tmp_path, spoiled(**changes)), budget=1 << 30)
    assert len(found.encode("abcdefgh" * 3)) == 21
    found.close()


def test_a_strip_of_any_count(tmp_path):
    from tokenizers import decoders, models

    model = models.WordLevel({"  a": 0, "[UNK]": 1}, "[UNK]")
    decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1 << 40, 0)])
    found = Tokenizer(OfText(tmp_path, json.dumps(made(model, decoder))))
    assert found.decode([0, 0]) == "a  a"
    found.close()


def test_a_budget_bounds_it(tmp_path):
    """What the file or the text would take beyond the budget is refused in one line."""
    used = memory.held()[1]
    with pytest.raises(FormatError, match="more --memory may do"):
        Tokenizer(OfText(tmp_path, json.dumps(byte_level())), budget=used - (8 << 20))
    found = Tokenizer(OfText(tmp_path, json.dumps(byte_level())), budget=used + (24 << 20))
    with pytest.raises(UserError, match=r"of 2000000 characters cannot be tokenized: .* memory"):
        found.encode("ab" * 1_000_000)
    assert found.encode("ab")
    found.close()
