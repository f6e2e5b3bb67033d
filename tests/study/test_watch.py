"""A recorded run: it is the run that happened, and the page shows what was recorded."""

import http.client
import json
import re
from dataclasses import replace
from itertools import product
from urllib.parse import urlparse

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA, keep_rows
from flashinfer import Model
from flashinfer.cli.main import main
from flashinfer.cli.run import demo_model
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import convert
from flashinfer.plan.profile import boards, load
from flashinfer.study.watch import replay as replaying
from flashinfer.study.watch.live import LiveServer
from flashinfer.study.watch.page import Recorded, filled, measured, own_setting, page, told
from flashinfer.study.watch.recorder import AHEAD, IN_DRAM, MISSING, Recorder
from flashinfer.study.watch.replay import Replay, Setting, replay_all

PROMPT = list(range(5, 40))
GREEDY = {"temperature": 0, "stop_at_eos": False}
PROFILE = load(boards()["rpi5-nvme"])
SMALL = {"draft": "off", "context": 128, "memory": "4G"}


def run(path, tokens=24, slots=500, **options):
    """(tokens, the Recorder, figures of the generation) of a run whose layers have so many
    slots."""
    with Model.open(path, **{**SMALL, **options}) as model:
        for layer in model.layers:
            keep_rows(layer.feed_forward, slots, options.get("window"))
        ffns = [layer.feed_forward for layer in model.layers]
        predictors = [ffn.predictor for ffn in ffns]
        with Recorder(model).attached() as recorder:
            tokens = list(model.generate(PROMPT, tokens, **GREEDY))
        assert [layer.feed_forward for layer in model.layers] == ffns
        assert [ffn.predictor for ffn in ffns] == predictors
        assert all(ffn.neurons.tap is None for ffn in ffns) and model.flash.watcher is None
        recorder.finished()
        return tokens, recorder, model.stats.generation


@pytest.fixture(scope="module")
def recording():
    """(tokens, Recorder, phase) of the demo model."""
    return run(demo_model())


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"neurons": "dense"}])
def test_recording_changes_nothing_and_counts_everything(options):
    with Model.open(demo_model(), **SMALL, **options) as model:
        expected = list(model.generate(PROMPT, 24, **GREEDY))
    slots = 1408 if "neurons" in options else 500
    tokens, recorder, phase = run(demo_model(), slots=slots, **options)
    assert tokens == expected and len(recorder.runs) == len(tokens) - 1
    layers = [layer for one in recorder.runs for layer in one.layers]
    places = np.concatenate([layer.place for layer in layers])
    if "neurons" not in options:
        assert np.count_nonzero(places == IN_DRAM) == phase.hits
        assert np.count_nonzero(places != IN_DRAM) == phase.misses > 0
    reads = [reads for one in recorder.runs for reads in one.reads]
    assert sum(int(one.lengths.sum()) for one in reads) == phase.flash_bytes
    assert sum(len(one.offsets) for one in reads if not one.streamed) == phase.reads
    for one in recorder.runs:
        ends = [(layer.begin, layer.end) for layer in one.layers]
        assert one.begin <= ends[0][0] and ends[-1][1] <= one.end + 1e-9
        assert all(a <= b for a, b in ends) and ends == sorted(ends)
        assert all(read.begin <= read.end for read in one.reads)


def test_what_is_active_is_predicted(recording):
    _, recorder, _ = recording
    for one in recorder.runs:
        for layer in one.layers:
            assert np.isin(layer.active, layer.used).all()
            assert (np.diff(layer.used) > 0).all()
            assert len(layer.used) == len(layer.place) == len(layer.slots)


def test_slots_tell_what_is_in_dram(recording):
    """Going through the changes as the page does: what was in DRAM without being read ahead is in a
    slot, and every unit used is afterwards, where it is told to be."""
    _, recorder, _ = recording
    at = [units.tolist() for units in recorder.initial]
    for one in recorder.runs:
        for slots, layer in zip(at, one.layers, strict=True):
            assert set(layer.used[layer.place == IN_DRAM].tolist()) <= set(slots)
            for slot, unit in layer.changed.tolist():
                slots[slot] = unit
            for unit, slot in zip(layer.used.tolist(), layer.slots.tolist(), strict=True):
                assert slots[slot] == unit


def test_experts_are_recorded(tmp_path):
    convert(DATA / "olmoe", tmp_path / "x.flash", "f32")
    with Model.open(tmp_path / "x.flash", context=48, draft="off") as model:
        expected = list(model.generate([5, 6, 7], 12, **GREEDY))
    with Model.open(tmp_path / "x.flash", context=48, draft="off") as model:
        with Recorder(model).attached() as recorder:
            assert list(model.generate([5, 6, 7], 12, **GREEDY)) == expected
        per_token = model.config.layers[0].ffn.router.experts_per_token
        runs = recorder.finished()
    assert all(len(layer.used) == per_token for one in runs for layer in one.layers)
    assert all(layer.active is None for one in runs for layer in one.layers)


def test_passes_of_several_tokens_are_left_out():
    with Model.open(demo_model(), **SMALL) as model, Recorder(model).attached() as recorder:
        model.forward(PROMPT)
        model.forward([7, 8])
        model.forward([9])
        model.forward([10, 11])
        model.forward([12])
    assert [one.token for one in recorder.finished()] == [len(PROMPT) + 2, len(PROMPT) + 5]


# ---------------------------------------------------------------- planned otherwise


@pytest.fixture(scope="module")
def replay(recording):
    with Bundle(demo_model()) as bundle:
        yield Replay(bundle, recording[1].runs, PROFILE)


def test_ideas_cost_what_they_save(replay):
    base = Setting(0.25, 0, 4096, 0.0)
    found = replay(base)
    dense = replay(replace(base, predict=False))
    assert dense.nbytes == sum(
        ffn.units * nbytes for ffn, nbytes in zip(replay.ffns, replay.unit_bytes, strict=True)
    )
    assert replay(replace(base, keep=False)).hits == 0 < found.hits < 1
    assert replay(replace(base, bundle=False)).nbytes > found.nbytes
    assert replay(replace(base, many=False)).seconds > found.seconds
    for worse in ({"keep": False}, {"bundle": False}, {"many": False}, {"disk": 50e6}):
        assert replay(replace(base, **worse)).seconds > found.seconds
    everything = replay(replace(base, memory=1.0))
    assert everything.hits > found.hits


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_settings_that_stand_for_each_other_read_the_same(replay, data):
    choices = [
        replaying.MEMORY,
        replaying.WINDOWS,
        replaying.CHUNKS,
        list(replaying.DISKS.values()),
    ]
    setting = Setting(
        *[data.draw(st.sampled_from(values)) for values in choices],
        *[data.draw(st.booleans()) for _ in replaying.IDEAS],
    )
    assert replay(setting) == replay(replaying._canonical(setting))


def test_a_window_that_is_recorded_is_replayed():
    """With the same window, memory and gaps: the units that were missed, to the last one."""
    _, recorder, _ = run(demo_model(), window=3, slots=1408)
    with Bundle(demo_model()) as bundle:
        again = Replay(bundle, recorder.runs, PROFILE)
        missed = again._misses_of(Setting(1.0, 3, 4096, 0.0))
    for one, layers in list(zip(recorder.runs, missed, strict=True))[4:]:  # the prompt's are gone
        for told_layer, units in zip(one.layers, layers, strict=True):
            assert np.array_equal(told_layer.used[told_layer.place != IN_DRAM], units)


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def text(recording):
    """The page of the recording, its text hostile."""
    _, recorder, _ = recording
    hostile = '</script><script>alert("&")//'
    recorded = Recorded(hostile, hostile, hostile, [hostile] * len(recorder.runs), recorder.runs,
                        recorder.initial)  # fmt: skip
    with Model.open(demo_model(), **SMALL) as model:
        replay = Replay(model.bundle, recorder.runs, PROFILE)
        taken, planned = measured(recorder.runs[replay.skipped :]), replay(own_setting(model))
        return page(model, recorded, replay, taken, planned)


def data_of(text):
    """What a page has to show."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    return json.loads(found[1])


def test_a_page_stands_alone(text, recording):
    assert text.count("<script") == 2 and not re.search(r"https?://|\bsrc=|@import|url\(", text)
    data = data_of(text)
    assert data["prompt"].startswith("</script>")
    assert len(data["runs"]) == len(recording[1].runs)
    assert len(text) * 64 / len(data["runs"]) < 3e6


def test_the_page_finds_the_setting_that_its_controls_show(text, replay):
    """By the same arithmetic as in page.js: memory, window, chunk, disk, then the ideas."""
    data = data_of(text)
    axes = [data["axes"][name] for name in ("memory", "window", "chunk", "disk")]
    every = list(replaying.settings())
    assert len(data["planned"]) == len(every) == np.prod([*map(len, axes), 16])
    places = product(*[range(len(axis)) for axis in axes], *[(0, 1)] * 4)
    for place, setting in zip(places, every, strict=True):
        index = 0
        for at, axis in zip(place[:4], axes, strict=True):
            index = index * len(axis) + at
        for off in place[4:]:
            index = index * 2 + off
        assert every[index] is setting
        assert setting.window == replaying.WINDOWS[place[1]] and setting.many == (not place[7])
    found = replay(every[1000])
    assert data["planned"][1000] == [float(f"{v:.4g}") for v in vars(found).values()]
    assert replay_all(replay)[1000] == found


def test_what_was_measured_is_told(recording, text):
    _, recorder, phase = recording
    found = measured(recorder.runs)
    assert found.nbytes * len(recorder.runs) == pytest.approx(phase.flash_bytes)
    assert found.reads * len(recorder.runs) == pytest.approx(phase.reads)
    one = told(recorder.runs, [""] * len(recorder.runs), list_reads=True)[3]
    for read, (begin, end, layer, count, nbytes, offsets, sizes) in zip(
        recorder.runs[3].reads, one["reads"], strict=True
    ):
        assert layer == read.layer and begin <= end and count == len(offsets)
        assert nbytes == sum(sizes) * 512 and [512 * o for o in offsets] == read.offsets.tolist()
    with Model.open(demo_model(), **SMALL) as model:
        assert own_setting(model).predict and own_setting(model).memory == 1.0
    places = {place for layer in one["layers"] for place in layer["place"]}
    assert places <= {IN_DRAM, AHEAD, MISSING}


# ---------------------------------------------------------------- live


def ask(server, path, host=None):
    """(status, body) of a request."""
    address = urlparse(server.address).netloc
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request("GET", path, headers={"Host": host or address})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_a_live_page_is_served_to_this_machine_alone():
    template = filled({"runs": [], "live": True})
    with LiveServer(template) as server:
        assert server.address.startswith("http://127.0.0.1:")
        assert ask(server, "/") == (200, template.encode())
        server.add({"text": "a"})
        server.add({"text": "b"})
        assert json.loads(ask(server, "/runs?from=1")[1]) == {
            "runs": [{"text": "b"}],
            "done": False,
        }
        for odd in ("-1", "x", "99999999999", "%C2%B2", ""):
            assert ask(server, f"/runs?from={odd}")[0] == 200
        assert ask(server, "/etc/passwd")[0] == 404
        assert ask(server, "/", host="evil.example")[0] == 403
        server.finish(0.0)
        assert json.loads(ask(server, "/runs?from=2")[1]) == {"runs": [], "done": True}
    with pytest.raises(OSError):
        ask(server, "/")


# ---------------------------------------------------------------- the commands


@pytest.fixture
def few(monkeypatch):
    """Few settings to replay."""
    monkeypatch.setattr(replaying, "MEMORY", (0.1, 1.0))
    monkeypatch.setattr(replaying, "WINDOWS", (1, 0))


def test_watch_and_record_write_the_same_run(tmp_path, capsys, few):
    options = ["-p", "def f(", "-n", "9", "--temp", "0", "--device", "rpi5-nvme"]
    texts = []
    for name, command in (
        ("a.html", ["watch", str(demo_model()), *options, "-o"]),
        ("b.html", ["run", str(demo_model()), *options, "--record"]),
        ("c.html", ["watch", str(demo_model()), *options, "--live", "-o"]),
    ):
        assert main([*command, str(tmp_path / name)]) == 0
        data = data_of((tmp_path / name).read_text())
        texts.append((data["prompt"], [one["text"] for one in data["runs"]]))
    assert texts[0] == texts[1] == texts[2] and texts[0][0].startswith("def f(")
    assert "http://127.0.0.1:" in capsys.readouterr().err


def test_watch_gives_its_figures(tmp_path, capsys, few):
    figures = tmp_path / "x.json"
    arguments = ["--tokens", "5,6,7", "-n", "5", "--device", "rpi5-nvme", "--json", str(figures)]
    assert main(["watch", str(demo_model()), *arguments, "-o", str(tmp_path / "x.html")]) == 0
    found = json.loads(figures.read_text())
    assert found["generated_tokens"] == 5 and found["bytes"] == (tmp_path / "x.html").stat().st_size
    assert found["measured"]["tokens_per_second"] > 0 < found["planned"]["tokens_per_second"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "1"], "at least two tokens must be written"),
        (["-o", "/nowhere/x.html"], "cannot be written"),
        (["-o", str(demo_model())], "is what is read"),
        (["--device", "nothing"], "is no file and not one of"),
    ],
)
def test_wrong_arguments(arguments, message, capsys, few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["watch", str(demo_model()), "-p", "def f(x):", "--temp", "0"]
    device = [] if "--device" in arguments else ["--device", "rpi5-nvme"]
    assert main([*base, *device, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
