"""Profiles, the cost model and the commands that show them."""

import gc
import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from flashinfer import Model
from flashinfer.cli.run import demo_model
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import BudgetError, FormatError, UserError
from flashinfer.formats.number_formats import FORMATS
from flashinfer.paper import ways
from flashinfer.paper.pieces import one_piece
from flashinfer.paper.router import SURE
from flashinfer.paper.unit_store import UnitStore
from flashinfer.plan import memory, profile
from flashinfer.plan import setup as planning
from flashinfer.plan.cost import predict
from flashinfer.plan.expected_reads import expected_reads
from flashinfer.plan.options import Options
from flashinfer.plan.plan import make_plan
from flashinfer.plan.timeline import STREAMS, UNITS, Timeline
from flashinfer.probe import probing as probe
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import config_like

SLOW = "rpi5-sd"


@pytest.mark.parametrize("name", profile.boards())
def test_boards_are_said_to_be_estimates_and_go_up_with_size(name, tmp_path):
    board = profile.find(name, tmp_path)
    assert board.note.startswith("estimated: ")
    sizes = sorted(board.reads)
    times = [board.read_seconds(size) for size in sizes]
    alone = [board.batch_seconds(1, size) for size in sizes]
    speeds = [board.reads[size] for size in sizes]
    for rising in (times, alone, speeds, [board.streams[size] for size in sorted(board.streams)]):
        assert rising == sorted(rising)
    assert all(many <= one for many, one in zip(times, alone, strict=True))
    assert board.stream_speed(1 << 22) <= speeds[-1] <= board.dram


def test_a_profile_is_kept_and_read_again(tmp_path):
    board = profile.find(SLOW, tmp_path)
    profile.save(board, tmp_path / "new" / "x.json")
    assert profile.load(tmp_path / "new" / "x.json") == board
    assert profile.find(tmp_path / "new" / "x.json", tmp_path) == board
    assert profile.find(None, tmp_path) is None  # nothing was measured here
    profile.save(board, profile.cache_path(tmp_path))
    assert profile.find(None, tmp_path) == board
    profile.cache_path(tmp_path).unlink()


def test_a_profile_from_before_a_number_format_takes_the_nearest_ones_figures(tmp_path):
    """q4_0 is as large as others of its bits; the profile knows that it was not measured."""
    board = profile.find(SLOW, tmp_path)
    raw = asdict(board)
    raw.pop("unmeasured")
    known = ("f32", "f16", "bf16", "q8_0")
    for kind in ("linear", "sparse", "many"):
        raw[kind] = {name: raw[kind][name] for name in known}
    (tmp_path / "x.json").write_text(json.dumps(raw))
    found = profile.load(tmp_path / "x.json")
    assert found.linear["q4_0"] == found.linear["q4_K"] == board.linear["q8_0"]
    assert found.note == board.note and set(found.unmeasured) == set(FORMATS) - set(known)
    profile.save(found, tmp_path / "x.json")
    assert profile.load(tmp_path / "x.json") == found
    raw["linear"].clear()
    (tmp_path / "x.json").write_text(json.dumps(raw))
    with pytest.raises(FormatError, match="is not a profile"):
        profile.load(tmp_path / "x.json")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", "[[" * 9999, '{"reads": {"x": 1}}', '{"reads": {}}']
)
def test_a_wrong_profile_is_one_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FormatError, match="is not a profile; flashinfer probe makes one"):
        profile.load(tmp_path / "x.json")


@pytest.mark.parametrize(
    "key, value", [("alone", {}), ("layer", "x"), ("reads", {"4096": 0}), ("submit", 3)]
)
def test_a_profile_of_nonsense_is_one_line(tmp_path, key, value):
    raw = {**asdict(profile.find(SLOW, tmp_path)), key: value}
    (tmp_path / "x.json").write_text(json.dumps(raw))
    with pytest.raises(FormatError, match="is not a profile"):
        profile.load(tmp_path / "x.json")


def test_gaps_are_worth_reading_where_requests_are_dear(tmp_path):
    board = profile.find(SLOW, tmp_path)
    # A request costs its bytes and nothing else.
    fast = {4096: 1e9, 1 << 20: 1e9}
    free = replace(board, alone={4096: 4e-6, 1 << 20: 1e-3}, reads=fast, streams=fast)
    held = free.held(90e6, 2000)  # 2000 requests of up to 45 kB cost the same
    assert free.gap_bytes(8192) == 0
    assert 12_000 <= held.gap_bytes(8192) <= 60_000
    assert held.allowed_after(100, 100 * 4096) == pytest.approx(100 / 2000)
    assert held.allowed_after(10, 10 << 20) == pytest.approx((10 << 20) / 90e6)
    assert free.allowed_after(10, 10 << 20) == 0
    profile.save(held, tmp_path / "held.json")
    assert profile.load(tmp_path / "held.json") == held


def clock(wake=1e-12):
    """Reads of 1 ms of the flash's time, 5 ms alone; streams of 1 GB/s; submitting is free."""
    board = profile.find(SLOW, ".")
    return Timeline(
        replace(
            board, alone={4096: 5e-3, 8192: 5e-3}, reads={4096: 4096e3, 8192: 8192e3},
            streams={4096: 1e9, 8192: 1e9}, submit={4096: 1e-12}, wake=wake,
        )
    )  # fmt: skip


def test_reads_overlap_what_is_computed():
    line = clock()
    done = line.submit(11, 11 * 4096)  # 5 + 10 * 1 ms
    assert done == pytest.approx(15e-3)
    line.compute("a", 9e-3)
    behind = line.submit(4, 4 * 4096)  # in the shadow of the first: 4 * 1 ms more
    assert behind == pytest.approx(19e-3)
    line.wait(done)
    assert line.now == pytest.approx(15e-3)
    line.wait(done)
    line.compute("a", 30e-3)
    line.wait(behind)
    assert line.now == pytest.approx(45e-3) == pytest.approx(sum(line.seconds.values()))
    assert line.seconds[UNITS] == pytest.approx(6e-3)
    assert line.submit(0.5, 2048) - line.now == pytest.approx(2.5e-3)  # there is one, or none
    assert line.submit(0, 0) == line.now


def test_streams_take_the_longer_of_reading_and_computing():
    line = clock()
    line.stream("a", 10_000_000, 1 << 20, 4e-3)
    assert line.now == pytest.approx(10e-3) and line.seconds["a"] == pytest.approx(4e-3)
    line.stream("a", 10_000_000, 1 << 20, 30e-3)
    assert line.now == pytest.approx(40e-3)
    line.submit(20, 20 * 4096)  # which the next stream waits for
    line.stream("a", 10_000_000, 1 << 20, 0.0)
    assert line.now == pytest.approx(40e-3 + 24e-3 + 10e-3)


def test_a_flash_that_is_held_counts_bytes_and_reads_at_once():
    line = clock()
    line.profile = line.profile.held(1e6, 100)
    line.compute("a", 0.1)  # meanwhile the flash may save up
    assert line.submit(10, 40_960) == pytest.approx(0.114)  # 5 + 9 ms: they were allowed
    assert line.submit(30, 30 * 4096) == pytest.approx(0.4)  # 40 reads in all
    line.wait(0.4)
    line.stream("a", 1_000_000, 1 << 20, 0.0)  # bytes were left over
    assert line.now == pytest.approx(40 * 4096e-6 + 1)


def test_threads_that_wait_must_be_woken():
    line = clock(wake=1e-3)
    line.multiply("a", 2e-3)
    line.compute("b", 1e-4)  # not for long: they are still there
    line.multiply("a", 2e-3)
    assert line.now == pytest.approx(4.1e-3)
    line.wait(line.submit(1, 4096))
    line.multiply("a", 0.0)  # nothing wakes them
    line.multiply("a", 2e-3)
    assert line.now == pytest.approx(4.1e-3 + 5e-3 + 3e-3)


def mixture(tmp_path, **options):
    """8 of 32 experts of 96 KiB in 6 layers."""
    path = tmp_path / "x.flash"
    small = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 64,
             "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 500,
             "num_experts": 32, "num_experts_per_tok": 8}  # fmt: skip
    synthesize(path, {**config_like("olmoe-1b-7b", 256), **small}, **options)
    return Bundle(path)


def test_as_much_is_read_ahead_as_pays(tmp_path, monkeypatch):
    """Much where reads are slow to come, little where wrong ones cost what right ones do."""
    monkeypatch.setattr(memory, "rss", lambda: 60 << 20)
    board = replace(profile.find("laptop-nvme", tmp_path), layer=1e-3, cached=2e-3)
    sizes = sorted(board.reads)
    late = replace(board, alone=dict.fromkeys(sizes, 3e-3))  # after 3 ms, however little is read
    narrow = board.held(5e6)
    with mixture(tmp_path) as bundle:
        layers = bundle.calibration.layers
        assert all(0.5 < layer.guessed < layer.surest <= 1 for layer in layers[1:])
        with pytest.raises(BudgetError) as caught:
            planning.prepare(bundle, Options(memory=1, context=64))
        budget = caught.value.least + (8 << 20)
        found = {}
        for name, device in {"late": late, "narrow": narrow, "unknown": None}.items():
            setup = planning.prepare(bundle, Options(memory=budget, context=64, device=device))
            setup.flash.close()
            found[name] = setup.plan.prefetch
        assert found["narrow"] < found["late"] == 1 and found["unknown"] == 0.5


@pytest.mark.parametrize("waits", [True, False])
def test_experts_are_prefetched_when_the_reads_before_them_are_done(tmp_path, monkeypatch, waits):
    """By the engine and by the plan, which ask the same function."""
    monkeypatch.setattr(memory, "rss", lambda: 60 << 20)
    monkeypatch.setattr(ways, "FILLING_BYTES", 0 if waits else 1 << 30)
    device = replace(profile.find("laptop-nvme", tmp_path), layer=1e-3, cached=2e-3)
    late = replace(device, alone=dict.fromkeys(device.reads, 3e-3))
    events, submit, wait = [], Timeline.submit, Timeline.wait

    def submitted(line, *reads):
        events.append("submit")
        return submit(line, *reads)

    def waited(line, done, *part):
        if done:
            events.append("wait")
        wait(line, done, *part)

    with mixture(tmp_path) as bundle:
        with pytest.raises(BudgetError) as caught:
            planning.prepare(bundle, Options(memory=1, context=64))
        options = Options(memory=caught.value.least + (8 << 20), context=64, device=late)
        setup = planning.prepare(bundle, options)
        setup.flash.close()
        assert setup.plan.prefetch > 0
        monkeypatch.setattr(Timeline, "submit", submitted)
        monkeypatch.setattr(Timeline, "wait", waited)
        predict(bundle, setup.plan, setup.profile, setup.flash.gap_bytes)
        # Of the first layer, which nobody guesses: its reads, and the next layer's.
        assert events[:3] == (["submit", "wait", "submit"] if waits else ["submit"] * 2 + ["wait"])
        with Model.open(bundle.path, options) as model:
            kinds, reads = [], UnitStore.submit

            def noted(store, units, slots, urgent=True):
                kinds.append(urgent)
                return reads(store, units, slots, urgent)

            monkeypatch.setattr(UnitStore, "submit", noted)
            model.forward([5])
            assert (False in kinds) == waits


@pytest.mark.parametrize("row_bytes, gap", [(8192, 0), (8192, 20_000), (2304, 4096), (512, 9000)])
def test_merged_reads_are_counted_as_they_come(row_bytes, gap):
    """Against rows drawn at random and merged one by one."""
    random, neurons, block, share = np.random.default_rng(0), 8192, 512, 0.05
    found = []
    for _ in range(20):
        rows = np.flatnonzero(random.random(neurons) < share)
        starts = rows * row_bytes // block * block
        ends = -(-(rows + 1) * row_bytes // block) * block
        joined = starts[1:] - ends[:-1] <= gap
        requests = len(rows) - np.count_nonzero(joined)
        between = np.where(joined, starts[1:] - ends[:-1], 0).sum()
        found.append(((ends - starts).sum() + between, requests))
    nbytes, requests = expected_reads(share * neurons, neurons, one_piece(row_bytes, block), gap)
    assert (nbytes, requests) == pytest.approx(np.mean(found, axis=0), rel=0.06)


@pytest.mark.parametrize("extra, options", [(0, {}), (1, {}), (2, {}), (9, {"window": 3})])
def test_the_bytes_expected_are_those_read(synthetic, monkeypatch, extra, options):
    """At budgets between the least and plenty, after the cache has warmed up."""
    monkeypatch.setattr(memory, "rss", lambda: 60 << 20)
    device = profile.find("laptop-nvme", synthetic)
    with pytest.raises(BudgetError) as caught:
        Model.open(synthetic, memory=1, context=256)
    budget = caught.value.least + (extra << 20)
    options = {"context": 256, "device": device, "draft": "off", **options}
    with Model.open(synthetic, memory=budget, **options) as model:
        prompt = [5 + 7 * i % 2900 for i in range(120)]
        list(model.generate(prompt, 100, temperature=0, stop_at_eos=False))
        figures = model.stats.as_dict()
    expected = figures["expected_flash_bytes_per_token"]
    assert expected > 0
    assert figures["flash_bytes_per_token"] == pytest.approx(expected, rel=0.25)


def test_dense_and_whole_models(synthetic):
    """Everything streamed, or nothing."""
    device = profile.find("laptop-nvme", synthetic)
    with Model.open(synthetic, context=64, device=device) as model:
        ffn = sum(layer.feed_forward.store.bundles.nbytes for layer in model.layers)
        assert model.expected.bytes == model.expected.requests == 0
        assert UNITS not in model.expected.seconds and STREAMS not in model.expected.seconds
        whole = model.expected.total
    gc.collect()  # so that the process takes as much memory at the next two openings
    with pytest.raises(BudgetError) as caught:
        Model.open(synthetic, memory=1, context=64, neurons="dense")
    budget = caught.value.least
    with Model.open(synthetic, memory=budget, context=64, neurons="dense", device=device) as model:
        assert model.expected.read["neurons"] == ffn and model.expected.requests == 0
        assert model.expected.total > whole


def test_probe_measures_and_leaves_nothing(tmp_path, monkeypatch, quick_probe):
    steps = []
    found = probe.probe(
        tmp_path, threads=1, progress=lambda what, done, total: steps.append(done / total)
    )
    assert list(tmp_path.iterdir()) == [] and steps == sorted(steps) and steps[-1] == 1
    profile.save(found, tmp_path / "x.json")
    assert profile.load(tmp_path / "x.json") == found
    assert found.threads == 1 and "measured" in found.note
    own = tmp_path / "model.flash"
    own.write_bytes(np.random.default_rng(0).bytes(8 << 20))
    found = probe.probe(own, threads=1)
    assert sorted(found.reads) == sorted(found.alone) and found.streams
    assert {path.name for path in tmp_path.iterdir()} == {"model.flash", "x.json"}
    monkeypatch.setattr(probe, "LEAST_FILE_BYTES", 16 << 20)
    with pytest.raises(UserError, match=r"smaller than the 16 MiB it takes; give its directory"):
        probe.probe(own)
    with pytest.raises(UserError, match=r"none: cannot be probed: No such file"):
        probe.probe(tmp_path / "none")


def test_plan_and_run_tell_what_to_expect(cli, synthetic):
    code, out, err = cli("plan", synthetic, "--memory", "2G")
    assert code == 1 and err.count("\n") == 1 and "flashinfer probe PATH" in err
    code, out, err = cli("plan", synthetic, "--device", "rpi6")
    assert code == 1 and err.count("\n") == 1 and "'rpi6' is no file and not one of" in err
    code, out, _ = cli("plan", synthetic, "--memory", "2G", "--device", SLOW)
    assert code == 0 and "key/value cache" in out and "tokens/s" in out and "estimated" in out
    figures = json.loads(
        cli("plan", synthetic, "--memory", "2G", "--device", SLOW, "--json", "-")[1]
    )
    assert figures["cost"]["total"] > 0 and figures["plan"]["budget"] == 2 << 30
    code, out, err = cli("run", synthetic, "--tokens", "5", "-n", 3, "--device", SLOW)
    assert code == 0 and "expected " in err
    code, out, err = cli("run", synthetic, "--tokens", "5", "-n", 3)
    assert code == 0 and "expected " not in err


def test_probe_from_the_command_line(cli, tmp_path, monkeypatch):
    board = profile.find(SLOW, tmp_path)
    monkeypatch.setattr("flashinfer.cli.probe.probe", lambda *args: board)
    code, out, _ = cli("probe", tmp_path, "-o", tmp_path / "p" / "x.json")
    assert code == 0 and "MB/s" in out and profile.load(tmp_path / "p" / "x.json") == board
    code, out, err = cli("probe", tmp_path / "none")
    assert code == 1 and err.count("\n") == 1


@pytest.mark.parametrize("more", [2 << 20, 6 << 20, 12 << 20])
def test_attention_or_experts_have_memory_first_whichever_is_faster(tmp_path, monkeypatch, more):
    monkeypatch.setattr(memory, "rss", lambda: 60 << 20)
    path, device = tmp_path / "x.flash", "rpi5-nvme"
    small = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512,
             "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 3000,
             "num_experts": 32}  # fmt: skip
    synthesize(path, {**config_like("olmoe-1b-7b", 64), **small}, "f16")
    with pytest.raises(BudgetError) as caught:
        Model.open(path, memory=1, context=64)
    options = Options(memory=caught.value.least + more, context=64, device=device)
    with Bundle(path) as bundle:
        setup, costs = planning.prepare(bundle, options), []
        flash, slot_bytes = setup.flash, setup.plan.slot_bytes
        for first in (True, False):
            decided = replace(options.decided(bundle), experts_first=first)
            plan = make_plan(bundle, decided, slot_bytes, 60 << 20)
            assert plan.base + plan.own <= plan.budget
            costs += [
                predict(bundle, replace(plan, prefetch=share), setup.profile, flash.gap_bytes).total
                for share in (1.0, SURE, 0.0)
            ]
        flash.close()
    assert setup.expected.total == min(costs) < max(costs)


@pytest.mark.parametrize("more", [1 << 20, 3 << 20, 6 << 20])
def test_slots_of_neurons_are_shared_in_whichever_way_is_faster(more):
    """By the reads that they save alone, or first to each layer what one token needs there."""
    base = 100 << 20
    with Bundle(demo_model()) as bundle:
        with pytest.raises(BudgetError) as caught:
            planning.prepare(bundle, Options(memory=base + 1, context=256), base)
        budget = caught.value.least + more
        options = Options(memory=budget, context=256, device="rpi5-nvme")
        setup, slots, costs = planning.prepare(bundle, options, base), [], []
        flash = setup.flash
        for fewest in (False, True):
            decided = replace(options.decided(bundle), fewest_reads=fewest)
            plan = make_plan(bundle, decided, setup.plan.slot_bytes, base)
            assert plan.base + plan.own <= plan.budget
            slots.append(plan.slots)
            costs += [
                predict(bundle, replace(plan, prefetch=share), setup.profile, flash.gap_bytes,
                        flash.alignment).total
                for share in (1.0, 0.0)
            ]  # fmt: skip
        flash.close()
    assert slots[0] != slots[1] and setup.expected.total == min(costs) < max(costs)
