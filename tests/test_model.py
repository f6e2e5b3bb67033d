"""The contracts: bits, memory, and that one piece and token by token are the same."""

import errno
import gc
import itertools
import os
import weakref

import numpy as np
import pytest

from conftest import keep_rows, logits_of
from flashinfer import BudgetError, Model, UserError, kernels
from flashinfer.formats.bundle.reader import verify
from flashinfer.formats.errors import FormatError
from flashinfer.paper.flash import STAGINGS
from flashinfer.paper.neuron_cache import NEVER, NeuronCache
from flashinfer.paper.prefetch import NoPrefetch, Prefetch
from flashinfer.plan.memory import MIB
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import config_like, opt_config

IDS = np.random.default_rng(8).integers(3, 96, 40)
LONG = np.random.default_rng(9).integers(3, 4000, 60)


@pytest.mark.parametrize("neurons", ["dense", "predicted"])
def test_one_piece_and_token_by_token(calibrated, twin, neurons):
    whole, single = logits_of(calibrated, IDS, neurons=neurons)
    np.testing.assert_allclose(whole, single, atol=1e-4)
    assert np.array_equal(whole, single)  # here even every bit


def test_in_pieces(calibrated, twin):
    with Model.open(calibrated) as model:
        whole = model.forward(IDS, every=True)
        for cut in (1, 7, 39):
            model.reset()
            parts = [model.forward(p, every=True) for p in (IDS[:cut], IDS[cut:])]
            assert np.array_equal(np.concatenate(parts), whole)


def test_window_changes_no_bit(synthetic, twin):
    found = [logits_of(synthetic, LONG, window=window) for window in (1, 5, 20, None)]
    assert all(np.array_equal(a, found[0][0]) for pair in found for a in pair)


def test_threads_change_no_bit(synthetic):
    found = [logits_of(synthetic, LONG, threads=threads) for threads in (1, 2, 4)]
    assert all(np.array_equal(a, found[0][0]) for pair in found for a in pair)


def test_reading_through_the_page_cache_changes_no_bit(synthetic, twin):
    found = [logits_of(synthetic, LONG, io=io) for io in ("auto", "threads", "buffered")]
    assert all(np.array_equal(a, found[0][0]) for pair in found for a in pair)


def test_budget_changes_no_bit(synthetic, twin, constant_rss):
    """From the least, where all that can streams, to plenty, where nothing is read."""
    plenty, _ = logits_of(synthetic, LONG, context=64)
    streamed = set()
    steps = (-1.5, -1, 0, 1, 2, 3, 4, 40)  # MiB; the least that is named has 2 to spare
    for extra, neurons in itertools.product(steps, ("predicted", "dense")):
        with pytest.raises(BudgetError) as caught:
            Model.open(synthetic, memory=1, context=64, neurons=neurons)
        assert f"{caught.value.least // MIB}M" in str(caught.value)
        budget = int(caught.value.least + extra * MIB)
        with Model.open(synthetic, memory=budget, context=64, neurons=neurons) as model:
            plan = model.plan
            head = type(model.decoder.head).__name__
            streamed.add((plan.attention_layers, head))
            whole = model.logits(LONG)
            model.reset()
            single = np.stack([model.forward([token]) for token in LONG[:20]])
        assert np.array_equal(whole, plenty), plan
        assert np.array_equal(single, plenty[:20]), plan
    heads = {head for _, head in streamed}  # the budgets did differ in what they left on flash
    assert heads == {"Streamed", "PartlyStreamed", "Resident"} and len(streamed) > 4, streamed


def test_predicted_is_dense_where_the_predictor_misses_nothing(synthetic, twin):
    dense, _ = logits_of(synthetic, LONG, neurons="dense")
    predicted, _ = logits_of(synthetic, LONG, neurons="predicted")
    assert np.array_equal(dense, predicted)


@pytest.mark.parametrize("dtype, dense_dtype", [("q8_0", None), ("q4_0", "f16"), ("q4_0", None)])
def test_blocks_of_odd_length_change_no_bit(tmp_path, twin, constant_rss, dtype, dense_dtype):
    """A bundle of 306 or 162 bytes lies across the device's blocks; budgets as above."""
    path = tmp_path / "x.flash"
    config = opt_config(288, 2, 4, 500, vocab_size=700, positions=128)
    synthesize(path, config, dtype, dense_dtype=dense_dtype)
    verify(path)
    ids = np.random.default_rng(1).integers(3, 700, 40)
    found = [
        logits_of(path, ids, **options)
        for options in ({}, {"window": 1}, {"neurons": "dense"}, {"io": "buffered"}, {"threads": 3})
    ]
    with pytest.raises(BudgetError) as caught:
        Model.open(path, memory=1, context=64)
    found.append(logits_of(path, ids, memory=caught.value.least, context=64))
    exact = dtype == "q8_0"  # with 4 bits the synthetic predictor is not always right
    for number, pair in enumerate(found):
        assert np.array_equal(pair[0], pair[1])
        assert np.array_equal(pair[0], found[0][0]) or (number == 2 and not exact)


@pytest.mark.parametrize(
    "name, options",
    [
        ("tinyllama-1.1b", {}),
        ("mistral-7b", {"sliding_window": 9, "model_type": "bamboo"}),
        ("qwen3-4b", {}),
        ("falcon-7b", {"alibi": True}),
        ("persimmon-8b", {}),
    ],
)
def test_other_architectures_change_no_bit(tmp_path, twin, constant_rss, name, options):
    """Windows, budgets from the least, threads and ways to read, as for OPT."""
    path, ids = tmp_path / "x.flash", np.arange(300, 340)
    small = {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 400,
             "ffn_hidden_size": 400, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 24, "vocab_size": 700}  # fmt: skip
    synthesize(path, {**config_like(name, 64), **small, **options})
    choices = [{}, {"window": 1}, {"neurons": "dense"}, {"io": "buffered"}, {"threads": 3}]
    found = [logits_of(path, ids, **choice) for choice in choices]
    for neurons in ("predicted", "dense"):
        with pytest.raises(BudgetError) as caught:
            Model.open(path, memory=1, context=64, neurons=neurons)
        for more in (0, 1):
            memory = caught.value.least + more * MIB
            found.append(logits_of(path, ids, memory=memory, context=64, neurons=neurons))
    assert all(np.array_equal(a, found[0][0]) for pair in found for a in pair)


@pytest.mark.parametrize("window", [2, None])
def test_reading_ahead_changes_no_bit(synthetic, twin, monkeypatch, window):
    """With right guesses, with wrong ones, and without any."""

    class Wrong(Prefetch):
        def begin(self, ffn, x, token, residual):
            super().begin(ffn, -x, token, -residual)

    monkeypatch.setattr(NeuronCache, "guesses_pay", True)
    found, read = {}, {}
    for name, prefetch in (("right", Prefetch), ("wrong", Wrong), ("none", NoPrefetch)):
        with Model.open(synthetic, window=window) as model:
            for layer in model.layers:  # where the whole layer stays nothing is guessed
                keep_rows(layer.feed_forward, 600, window)
                layer.feed_forward.prefetch = prefetch()
            found[name] = np.stack([model.forward([token]) for token in LONG])
            read[name] = model.flash.bytes_read
    assert np.array_equal(found["right"], found["none"])
    assert np.array_equal(found["wrong"], found["none"])
    assert read["wrong"] > 1.1 * read["none"] > 1.05 * read["right"]


@pytest.mark.parametrize("name", ["positive", "place", "merge_reads", "sparse_up", "sparse_down"])
@pytest.mark.parametrize("window", [2, None])
def test_a_token_that_is_interrupted_leaves_nothing_half_read(synthetic, monkeypatch, name, window):
    """Wherever it is: the next ones get the same bits."""
    monkeypatch.setattr(NeuronCache, "guesses_pay", True)
    kernel = getattr(kernels, name)
    with Model.open(synthetic, window=window) as model:
        for layer in model.layers:
            keep_rows(layer.feed_forward, 600, window)
        expected = np.stack([model.forward([token]) for token in LONG])
        for when in range(1, 12, 2):
            left = when

            def interrupting(*args):
                nonlocal left
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
                return kernel(*args)

            model.reset()
            model.forward(LONG[:5])
            monkeypatch.setattr(kernels, name, interrupting)
            with pytest.raises(KeyboardInterrupt):
                for token in LONG[5:]:
                    model.forward([token])
            monkeypatch.setattr(kernels, name, kernel)
            assert not model.flash.flying and len(model.flash.staging) == STAGINGS
            kept = sum(layer.feed_forward.store.cache.used > 0 for layer in model.layers)
            assert kept >= len(model.layers) - 2  # only what may not have been read is forgotten
            rest = np.stack([model.forward([token]) for token in LONG[model.position :]])
            assert np.array_equal(rest, expected[-len(rest) :])


def test_a_read_that_fails_leaves_nothing_half_read(synthetic):
    with Model.open(synthetic) as model:
        for layer in model.layers:
            keep_rows(layer.feed_forward, 600, None)
        expected = np.stack([model.forward([token]) for token in LONG[:9]])
        for ids in (LONG[8:9], LONG[8:], LONG[8:9]):  # alone, and in a prompt
            model.reset(8)
            for layer in model.layers:
                layer.feed_forward.store.cache.empty()
            right, model.flash.reader = model.flash.reader, BrokenReader(model.flash.reader)
            with pytest.raises(FormatError, match="Input/output error"):
                model.forward(ids)
            model.flash.reader = right
            assert not model.flash.flying
            assert np.array_equal(model.forward(LONG[8:9]), expected[8])


class BrokenReader:
    """The third batch of reads brings half and fails."""

    def __init__(self, reader):
        self.reader, self.batches = reader, 0

    def submit(self, fd, end, offsets, lengths, memory, destinations):
        self.batches += 1
        if self.batches < 3 or not len(lengths):
            return self.reader.submit(fd, end, offsets, lengths, memory, destinations)
        half = lengths // 1024 * 512
        return BrokenTicket(self.reader.submit(fd, end, offsets, half, memory, destinations))


class BrokenTicket:
    def __init__(self, ticket):
        self.ticket = ticket

    def wait(self):
        self.ticket.wait()
        raise OSError(errno.EIO, os.strerror(errno.EIO), 0)


def test_a_second_text_starts_afresh(calibrated):
    with Model.open(calibrated, window=3) as model:
        first = model.logits(IDS)
        model.logits(IDS[::-1])
        assert np.array_equal(model.logits(IDS), first)


def test_generate_greedily(calibrated):
    with Model.open(calibrated, context=48) as model:
        tokens = list(model.generate(IDS[:8], max_new_tokens=12, temperature=0, stop_at_eos=False))
        assert len(tokens) == 12 and model.stats.token_ids == tokens
        again = list(model.generate(IDS[:8], max_new_tokens=12, temperature=0, stop_at_eos=False))
        assert again == tokens
        logits = model.logits([*IDS[:8], *tokens])
    assert tokens == logits[7:-1].argmax(axis=1).tolist()


def test_generate_stops_at_the_end_of_text(calibrated):
    with Model.open(calibrated, context=48) as model:
        free = list(model.generate(IDS[:8], 40, temperature=0, stop_at_eos=False))
        model.config = type(model.config)(
            **{**vars(model.config), "eos_token_ids": (free[3],)},
        )
        stopped = list(model.generate(IDS[:8], 40, temperature=0))
        assert stopped == free[: free.index(free[3]) + 1]


def test_stats_count_what_was_read(synthetic):
    with Model.open(synthetic, window=1, draft="off") as model:
        model.flash.gap_bytes = 0
        tokens = list(model.generate([5], 20, temperature=0, stop_at_eos=False))
        figures = model.stats.as_dict()
        bundle = model.bundle.tensors["layers.0.ffn.bundles"].row_bytes
    stats = model.stats
    assert figures["token_ids"] == tokens and figures["generated_tokens"] == 20
    assert figures["prompt_tokens"] == 1 and stats.generation.tokens == 19
    # Every miss is one bundle of exactly its size, and rows of positions are read besides.
    rows = stats.generation.misses * bundle
    assert rows <= stats.generation.flash_bytes <= rows + 19 * 4096
    assert 0 <= figures["cache_hit_rate"] < 1
    assert figures["peak_rss_bytes"] > 10 * MIB and figures["window"] == 1


def test_neurons_stay_only_for_the_window(synthetic):
    with Model.open(synthetic, window=2) as model:
        model.forward(LONG)
        for token in LONG[:5]:
            model.forward([token])
        for layer in model.layers:
            cache = layer.feed_forward.store.cache
            last_used = cache.last_used[: cache.used]
            recent = (last_used > model.token - 1 - 2) | (last_used == NEVER)
            assert cache.used and recent.all()


def test_after_a_prompt_the_cache_holds_what_its_last_tokens_used(synthetic):
    """The streamed path must leave what the token-by-token path would have."""
    held = []
    for pieces in ([LONG], [[token] for token in LONG]):
        with Model.open(synthetic, window=5) as model:
            for piece in pieces:
                model.forward(piece)
            caches = [layer.feed_forward.store.cache for layer in model.layers]
            # Wrong guesses stay until the next token, marked as used never.
            in_window = [c.last_used[: c.used] > model.token - 1 - 5 for c in caches]
            held.append(
                [
                    sorted(c.neuron_at[: c.used][recent].tolist())
                    for c, recent in zip(caches, in_window, strict=True)
                ]
            )
            for number, cache in enumerate(caches):
                rows = model.bundle.read(f"layers.{number}.ffn.bundles")
                found = model.bundle.bundles(number).format.decode(cache.slots[: cache.used])
                assert np.array_equal(found, rows[cache.neuron_at[: cache.used]])
    assert held[0] == held[1]


WRONG = {
    "token too large": (lambda m: m.forward([96]), "token id 96 is not within 0 to 95"),
    "token negative": (lambda m: m.forward([3, -1]), "token id -1"),
    "no tokens": (lambda m: m.forward([]), "one or more"),
    "tokens of floats": (lambda m: m.forward([1.5]), "whole numbers"),
    "prompt beyond the context": (lambda m: m.forward([5] * 49), "do not fit the context of 48"),
    "too many new tokens": (lambda m: list(m.generate([5] * 40, 20)), "context"),
    "negative temperature": (lambda m: list(m.generate([5], 1, temperature=-1)), "temperature"),
    "top-k": (lambda m: list(m.generate([5], 1, top_k=-1)), "top-k"),
    "top-p": (lambda m: list(m.generate([5], 1, top_p=0)), "top-p"),
}


@pytest.mark.parametrize("call, says", WRONG.values(), ids=WRONG)
def test_wrong_calls_are_one_line(calibrated, call, says):
    with Model.open(calibrated, context=48) as model:
        with pytest.raises(UserError, match=says) as caught:
            call(model)
        assert "\n" not in str(caught.value)
        assert model.position == 0
        model.forward([5])  # and the model still works


@pytest.mark.parametrize(
    "options, says",
    [
        ({"memory": "nonsense"}, "600M"),
        ({"memory": 0}, "not a size"),
        ({"window": 0}, "window 0"),
        ({"context": 49}, "1 to 48"),
        ({"threads": 0}, "threads 0"),
        ({"neurons": "some"}, "predicted, dense"),
        ({"io": "magic"}, "auto, io_uring, threads, buffered"),
    ],
)
def test_wrong_options_are_one_line(calibrated, options, says):
    with pytest.raises(UserError, match=says):
        Model.open(calibrated, **options)


def test_predicted_needs_predictors(plain):
    with pytest.raises(UserError, match="flashinfer calibrate"):
        Model.open(plain, neurons="predicted")
    with Model.open(plain) as model:
        assert model.plan.mode == "dense"


def test_a_file_cut_after_opening_gives_one_line_and_no_half_read_row(synthetic, tmp_path):
    path = tmp_path / "x.flash"
    path.write_bytes(synthetic.read_bytes())
    with Model.open(path, window=1) as model:
        before = model.logits(LONG[:3])
        whole = path.read_bytes()
        with open(path, "r+b") as file:
            file.truncate(len(whole) // 2)
        with pytest.raises(UserError, match=r"x\.flash: reading .* bytes at .*: the file ends"):
            for token in LONG:
                model.forward([token])
        path.write_bytes(whole)
        assert np.array_equal(model.logits(LONG[:3]), before)


def test_a_closed_model_is_freed_at_once(synthetic):
    """Its memory must not wait for the garbage collector: the next model's budget counts it."""
    gc.disable()
    try:
        with Model.open(synthetic, context=64) as model:
            list(model.generate([5, 6], 12, temperature=0))
            list(model.generate_many([[5], [6]], 3, temperature=0))
        held = weakref.ref(model)
        del model
        assert held() is None
    finally:
        gc.enable()
