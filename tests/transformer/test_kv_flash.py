"""Keys and values on flash: the same bits wherever they lie, whatever fails on the way."""

import errno
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from drafting import Anyhow, Known
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer import BudgetError, Model, UserError, kernels
from flashinfer.cli.main import main
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.plan import setup
from flashinfer.plan.cost import KEY_VALUES
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import config_like
from flashinfer.transformer.kv_cache import KV_DTYPES, KeyValueCache
from flashinfer.transformer.kv_flash import (
    KeyValueFile,
    KeyValuesOnFlash,
    page_tokens,
    part_bytes,
    tail_bytes,
)

CONTEXT, VOCABULARY = 600, 700
IDS = np.random.default_rng(3).integers(3, VOCABULARY, 560)
HEADS = AttentionConfig(
    num_attention_heads=4, num_key_value_heads=2, head_dim=128, hidden_size=96, norm=None
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model of which one layer of four has an attention window that moves, in a folder of its
    own."""
    path = tmp_path_factory.mktemp("model") / "x.flash"
    small = {
        "hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 200,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
        "vocab_size": VOCABULARY, "sliding_window": 9, "model_type": "qwen2",
        "use_sliding_window": True, "max_window_layers": 3,
    }  # fmt: skip
    synthesize(path, {**config_like("mistral-7b", 70_000), **small})
    return path


@pytest.fixture
def on_flash(monkeypatch):
    """on_flash(share): of the layers that can have their keys and values on flash so many do."""
    return lambda share: monkeypatch.setattr(setup, "KV_SHARES", (share,))


@pytest.fixture(scope="module")
def expected(path):
    """{(kernels, number format): logits of IDS} with all keys and values in DRAM."""
    return {}


def logits_in_dram(path, expected, dtype):
    key = kernels.in_use, dtype
    if key not in expected:
        with Model.open(path, context=CONTEXT, kv_dtype=dtype) as model:
            assert not model.plan.kv_on_flash
            expected[key] = model.logits(IDS)
    return expected[key]


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_where_they_lie_changes_no_bit(path, expected, on_flash, twin, dtype, share):
    """Of a prompt, of texts that go on in pieces of any length, and of tokens taken back."""
    wanted, random = logits_in_dram(path, expected, dtype), np.random.default_rng(4)
    on_flash(share)
    with Model.open(path, context=CONTEXT, kv_dtype=dtype) as model:
        assert model.plan.kv_on_flash == ((0, 2) if share == 0.5 else (0, 1, 2))
        assert np.array_equal(model.logits(IDS), wanted)
        model.reset()
        while model.position < len(IDS) - 1:
            begin = model.position
            end = min(len(IDS), begin + int(random.integers(1, 150)))
            assert np.array_equal(model.forward(IDS[begin:end], every=True), wanted[begin:end])
            model.reset(max(0, end - int(random.choice([0, 3, 100]))))
        assert model.kv_file.flash.bytes_read > 0


@pytest.mark.parametrize("io", ["io_uring", "threads", "buffered"])
def test_every_way_to_read(path, expected, on_flash, io):
    wanted = logits_in_dram(path, expected, "f16")
    on_flash(1.0)
    with Model.open(path, context=CONTEXT, io=io) as model:
        assert np.array_equal(model.forward(IDS[:500], every=True), wanted[:500])
        assert np.array_equal(model.forward(IDS[500:], every=True), wanted[500:])


def test_texts_that_share_a_pass_and_their_beginning(path, on_flash):
    prompts = [IDS[: 130 + n].tolist() for n in (0, 40, 300, 1, 65)]
    with Model.open(path, context=CONTEXT) as model:
        alone = [list(model.generate(ids, 30, temperature=0)) for ids in prompts]
    on_flash(0.7)
    with Model.open(path, context=CONTEXT, texts=3) as model:
        written = model.generate_many(prompts, 30, temperature=0)
        assert {one.request.number: one.token_ids for one in written} == dict(enumerate(alone))


def test_drafts_that_are_taken_back(path, on_flash):
    """Across the ends of pages, in both directions."""
    with Model.open(path, context=CONTEXT) as model:
        text = list(model.generate(IDS[:50].tolist(), 200, temperature=0, stop_at_eos=False))
    on_flash(1.0)
    with Model.open(path, context=CONTEXT) as model:
        model.pace = Anyhow(min(20, model.plan.drafts))
        known = Known([*IDS[:50].tolist(), *text], 0.8, vocab_size=VOCABULARY)
        found = model.generate(
            IDS[:50].tolist(), 200, temperature=0, stop_at_eos=False, drafter=known
        )
        assert list(found) == text
        assert model.stats.drafts.drafted > model.stats.drafts.accepted > 20


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.4)])
def test_a_session_goes_on_wherever_they_lie(path, expected, on_flash, tmp_path, shares):
    wanted = logits_in_dram(path, expected, "f16")
    on_flash(shares[0])
    with Model.open(path, context=CONTEXT) as model:
        model.forward(IDS[:333])
        model.save_session(tmp_path / "s")
        assert np.array_equal(model.forward(IDS[333:], every=True), wanted[333:])
    on_flash(shares[1])
    with Model.open(path, context=CONTEXT) as model:
        assert model.load_session(tmp_path / "s").kept == 333
        assert np.array_equal(model.forward(IDS[333:], every=True), wanted[333:])


class Interrupted(Exception):
    pass


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(KV_DTYPES))
def test_what_attention_finds(tmp_path_factory, data, dtype):
    """The same as where all stays, whatever is taken back, and wherever writing is interrupted."""
    context, random = 900, np.random.default_rng(data.draw(st.integers(0, 9)))
    folder, part = tmp_path_factory.getbasetemp(), part_bytes(HEADS, dtype, context)
    file = KeyValueFile(folder, 2 * part, part, "auto")
    tails = np.zeros((2, tail_bytes(HEADS, dtype)), dtype=np.uint8)
    own, other = (KeyValuesOnFlash(file, HEADS, dtype, context, tail) for tail in tails)
    shape = own.keys.shape
    plain = KeyValueCache(
        np.zeros(shape, own.keys.dtype), np.zeros(shape, own.keys.dtype), None, context
    )
    position = 0
    for step in range(data.draw(st.integers(2, 7))):
        position -= data.draw(st.integers(0, position))
        if data.draw(st.booleans()):
            file.begin([SimpleNamespace(cache=own, start=position)])
        n = data.draw(st.integers(1, min(300, context - position)))
        k, v = random.standard_normal((2, n, 2, 128)).astype(np.float32)
        fails = data.draw(st.sampled_from([None, None, 0, 1, 3]))
        try:
            pass_of(own, k, v, position, file, fails)
        except Interrupted:
            pass  # the text has not grown
        pass_of(own, k, v, position, file, None)
        pass_of(plain, k, v, position, file, None)
        position += n
        if step == 2:  # another text goes on with what they have in common
            other.copy(own, position)
            own, other = other, own
        own.bring(position)
        assert np.array_equal(own.keys[:, :position], plain.keys[:, :position])
        assert np.array_equal(own.values[:, :position], plain.values[:, :position])
    file.close()


def pass_of(cache, k, v, start, file, fails):
    """A pass of attention over some tokens; ``fails``: which write is interrupted."""
    write, left = file.write, iter(range(10**9 if fails is None else fails))

    def failing(*args):
        if next(left, None) is None:
            raise Interrupted
        write(*args)

    file.write = failing
    try:
        for begin, end in cache.pieces(start, len(k)):
            cache.remember(k[begin:end], v[begin:end], start + begin)
    finally:
        file.write = write


def test_a_disk_that_fills_up_is_told_and_nothing_is_lost(path, expected, on_flash, monkeypatch):
    wanted = logits_in_dram(path, expected, "f16")
    on_flash(1.0)
    with Model.open(path, context=CONTEXT) as model:
        model.forward(IDS[:50])
        with monkeypatch.context() as patch:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            patch.setattr(os, "pwrite", lambda *args: (_ for _ in ()).throw(full))
            with pytest.raises(UserError, match=r"keys and values.*No space left.*--scratch"):
                model.forward(IDS[50:200])
        assert model.position == 50
        assert np.array_equal(model.forward(IDS[50:200], every=True), wanted[50:200])


def test_a_file_that_ends_early_is_told(path, expected, on_flash):
    wanted = logits_in_dram(path, expected, "f16")
    on_flash(1.0)
    with Model.open(path, context=CONTEXT) as model:
        model.forward(IDS[:200])
        os.truncate(model.kv_file.fd, 0)
        with pytest.raises(UserError, match="keys and values"):
            model.forward(IDS[200:210])
        model.reset()
        assert np.array_equal(model.forward(IDS[:300], every=True), wanted[:300])


def test_nothing_stays_in_the_folder(path, on_flash, tmp_path):
    on_flash(1.0)
    with Model.open(path, context=CONTEXT, scratch=tmp_path) as model:
        model.forward(IDS[:200])
        assert os.listdir(tmp_path) == []
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert model.kv_file.fd < 0 and model.kv_file.flash.closed


def test_folders_that_cannot_be_used(path, on_flash, tmp_path, monkeypatch, capsys):
    on_flash(1.0)
    with pytest.raises(UserError, match=r"--scratch .*nowhere: is no folder that can be written"):
        Model.open(path, scratch=tmp_path / "nowhere")
    assert main(["inspect", str(path), "--scratch", str(path)]) == 1
    assert "is no folder that can be written" in capsys.readouterr().err
    statvfs = SimpleNamespace(f_bavail=1, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda folder: statvfs)
    with pytest.raises(UserError, match=r"disk is full; .* MB are needed"):
        Model.open(path, context=CONTEXT)
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    monkeypatch.setattr(setup, "KV_SHARES", (0.0, 1.0))
    with Model.open(path, context=CONTEXT) as model:  # beside the model, nobody asked for it
        assert not model.plan.kv_on_flash


def test_a_context_that_outgrows_the_budget(path, constant_rss, monkeypatch):
    """It is planned and priced; the least budget is what the plan holds to."""
    context, plenty = 60_000, 1 << 30
    with monkeypatch.context() as patch:
        patch.setattr(setup, "KV_SHARES", (0.0,))
        with pytest.raises(BudgetError) as refused:
            Model.open(path, context=context, memory=1 << 20)
        in_dram = refused.value.least
    with pytest.raises(BudgetError) as refused:
        Model.open(path, context=context, memory=1 << 20)
    least = refused.value.least
    assert least < in_dram
    for budget in (least, (least + in_dram) // 2):
        with Model.open(path, context=context, memory=budget) as model:
            plan = model.plan
            assert plan.kv_on_flash
            taken = plan.base + plan.resident + plan.kv_cache + plan.buffers + plan.working
            assert taken + plan.cache <= budget
            held = 2 * model.kv_file.stage_bytes
            for cache in model.text.caches:
                on_flash = isinstance(cache, KeyValuesOnFlash)
                held += cache.tail.nbytes if on_flash else cache.keys.nbytes + cache.values.nbytes
            assert held <= plan.kv_cache <= held + 4 * 2 * 4096
            assert plan.kv_flash_bytes(model.bundle) == model.kv_file.given
    with Model.open(path, context=context, memory=plenty) as model:
        assert not model.plan.kv_on_flash and model.kv_file is None


def test_what_is_read_is_predicted(path, on_flash):
    """In the middle of the context: within a page of each layer."""
    on_flash(1.0)
    with Model.open(path, context=CONTEXT, device="rpi5-nvme", memory=1 << 30) as model:
        model.forward(IDS[: CONTEXT // 2])
        before = model.kv_file.flash.bytes_read
        model.forward(IDS[CONTEXT // 2 : CONTEXT // 2 + 1])
        read = model.kv_file.flash.bytes_read - before
        layers = [model.config.layers[i].attention for i in model.plan.kv_on_flash]
        page = sum(tail_bytes(config, "f16") for config in layers)
        assert 0 <= model.expected.read[KEY_VALUES] - read <= page


def test_plan_and_inspect_tell(path, on_flash, capsys):
    on_flash(1.0)
    for command in ("plan", "inspect"):
        arguments = [command, str(path), "-c", str(CONTEXT), "--device", "rpi5-nvme"]
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert "on flash" in said and "of 3 layers" in said


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [1, 32, 64, 80, 128, 256])
def test_pages_are_whole_blocks(dtype, head_dim):
    config = replace(HEADS, head_dim=head_dim)
    page = page_tokens(config, dtype)
    assert tail_bytes(config, dtype) % (2 * config.num_key_value_heads * 4096) == 0
    assert part_bytes(config, dtype, page + 1) == 2 * tail_bytes(config, dtype)


def test_alibi_stays(tmp_path):
    synthesize(tmp_path / "x.flash", {**config_like("falcon-7b", 512), "alibi": True,
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99,
        "ffn_hidden_size": 128})  # fmt: skip
    with Bundle(tmp_path / "x.flash") as bundle:
        assert all(layer.attention.alibi for layer in bundle.config.layers)
        with pytest.raises(BudgetError):
            Model.open(bundle, memory=1 << 20)
