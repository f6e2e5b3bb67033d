"""The experiments: what they count is what is there, and what they show can be read."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA
from flashinfer import UserError
from flashinfer.cli.main import main
from flashinfer.cli.run import demo_model
from flashinfer.cli.study import EXPERIMENTS, experiment
from flashinfer.formats.convert import convert
from flashinfer.model import Model
from flashinfer.plan.options import Options
from flashinfer.plan.profile import boards, load
from flashinfer.study.activity import Sample, Study, Used, activity
from flashinfer.study.charts import Axis, key, svg
from flashinfer.study.experiments.batches import mean_union
from flashinfer.study.experiments.windows import MOST, aggregated
from flashinfer.study.findings import Chart, Finding, Table
from flashinfer.study.ideal import watch
from flashinfer.study.page import figures_of, page

IDS = np.random.default_rng(3).integers(3, 400, 300).tolist()


@pytest.fixture
def study():
    """The demo model and random tokens, on a board that nobody measured."""
    profile = load(boards()["rpi5-nvme"])
    options = Options(context=256, memory="4G", device=profile)
    return Study(demo_model(), [Sample("random", IDS), Sample("half", IDS[:256])], options, profile)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_finds_something(study, quick_probe, name):
    """Figures that are finite, an answer with figures, and a chart of every series."""
    found = experiment(name)(study)
    assert found.name == name and found.question.endswith("?") and found.tables and found.charts
    assert any(re.search("[0-9]", sentence) for sentence in found.answer)
    json.dumps(found.as_dict(), allow_nan=False)
    for table in found.tables:
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
    for chart in found.charts:
        assert all(np.isfinite(points).all() and len(points) for points in chart.series.values())
        ElementTree.fromstring(svg(chart))


def test_a_window_changes_no_bit(study):
    found = experiment("windows")(study)
    assert "the same digest" in found.answer[1]
    assert len({told for _, told in found.tables[1].rows}) == 1


def test_what_fires_is_what_the_engine_finds(study):
    """The same shares as in predicted mode, where the neurons that fire are found one by one."""
    layers = list(activity(study, Sample("x", IDS[:200]), "sparsity"))
    with Model.open(study.path, neurons="dense", context=256) as dense:
        assert [layer.units for layer in layers] == [
            layer.feed_forward.store.units.rows for layer in dense.layers
        ]
    with Model.open(study.path, neurons="predicted", context=256) as model:
        first = watch(model)[0]  # whose input is the same in both modes
        model.forward(IDS[:200])
    assert layers[0].counts().sum() == first.fired > 0


def test_experts_are_units(tmp_path):
    convert(DATA / "olmoe", tmp_path / "x.flash", "f32")
    profile = load(boards()["rpi5-nvme"])
    ids = [3 + n % 80 for n in IDS]
    study = Study(
        tmp_path / "x.flash", [Sample("x", ids)], Options(context=32, device=profile), profile
    )
    with study.bundle() as bundle:
        ffn = bundle.config.layers[0].ffn
    for layer in activity(study, study.samples[0], "sparsity"):
        assert layer.units == ffn.experts
        assert layer.by_token(0, layer.tokens).sum(axis=1).tolist() == (
            [ffn.router.experts_per_token] * len(ids)
        )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), units=st.integers(1, 40), share=st.floats(0, 1))
def test_unions_are_counted(seed, units, share):
    used = np.random.default_rng(seed).random((60, units)) < share
    layer = Used(np.packbits(used.T, axis=1), len(used), 1)
    assert np.array_equal(layer.by_token(0, 60), used)
    assert np.array_equal(layer.by_token(16, 41), used[16:41])
    assert layer.counts().tolist() == used.sum(axis=0).tolist()
    assert layer.share == pytest.approx(used.mean())
    found = aggregated(layer)
    for k in range(1, MOST + 2):
        sizes = [used[t - k + 1 : t + 1].any(axis=0).sum() for t in range(MOST + 1, 60)]
        assert found[k] == pytest.approx(np.mean(sizes))
    assert mean_union([layer], 60, apart=False) == pytest.approx(used.any(axis=0).mean())
    assert mean_union([layer], 60, apart=True) == pytest.approx(used.any(axis=0).mean())


class Strict(HTMLParser):
    """Collects the ids, the links, and what would be loaded."""

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.loaded, self.open = set(), [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found["id"]} if "id" in found else set()
        self.links += [found["href"]] if tag == "a" else []
        self.loaded += [found[name] for name in ("src", "data", "srcset") if name in found]
        self.loaded += [tag] if tag in ("script", "link", "iframe", "img") else []
        if tag not in ("meta", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in ("path", "rect") or self.open.pop() == tag


def test_a_page_stands_alone_and_names_are_only_text():
    """Whatever a text or a model is called; and each figure is in a table, too."""
    hostile = '<script>alert("x")</script>&'
    chart = Chart(hostile, hostile, "y", {hostile: [(0, 1.0), (1, 2.5)], "b": [(1, 3.0)]},
                  marks={hostile: 0.5})  # fmt: skip
    bars = Chart("bars", "x", "y", {"a": [(0, 1.0), (1, 0.0)]}, kind="bars", labels=[hostile, "q"])
    table = Table(hostile, [hostile, "n"], [[hostile, 1], ["x", None]])
    finding = Finding("one", hostile, hostile, hostile, [hostile], [table], [chart, bars])
    text = page(hostile, hostile, [finding, replace(finding, name="two")])
    parsed = Strict()
    parsed.feed(text)
    assert not parsed.loaded and not parsed.open and "<script" not in text
    assert [link[1:] for link in parsed.links] == ["one", "two"] and {"one", "two"} <= set(
        parsed.ids
    )
    assert "<nav" in text and "<nav" not in page(hostile, hostile, [finding])
    assert figures_of(chart).rows == [["0", 1.0, None], ["1", 2.5, 3.0]]
    assert figures_of(bars).rows == [[hostile, 1.0], ["q", 0.0]]
    assert "2.5" in text and "http" not in text and key(bars) == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=9), st.booleans())
def test_axes_hold_every_value(values, log):
    values = [abs(value) + 1e-9 for value in values] if log else values
    axis = Axis(values, log, 10.0, 90.0)
    assert 2 <= len(axis.ticks) <= 14
    assert all(10 <= axis(value) <= 90 for value in [*values, *axis.ticks])
    places = [axis(value) for value in sorted(values)]
    assert places == sorted(places)


def test_the_command(capsys, tmp_path):
    html, figures = tmp_path / "x.html", tmp_path / "x.json"
    text = tmp_path / "a.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 200)
    arguments = ["--text", str(text), "--tokens", "300", "--device", "rpi5-nvme"]
    files = ["--html", str(html), "--json", str(figures)]
    assert main(["study", "sparsity", *arguments, *files]) == 0
    said = capsys.readouterr().out
    assert "a.txt" in said and "Share of the units" in said
    assert "a.txt" in html.read_text() and "<svg" in html.read_text()
    found = json.loads(figures.read_text())
    assert [one["name"] for one in found["findings"]] == ["sparsity"]


def test_all_leaves_out_what_a_model_has_not(capsys, tmp_path, monkeypatch):
    """Whose neurons all fire; asked for by its name, that is an error."""
    monkeypatch.setattr("flashinfer.cli.study.EXPERIMENTS", ("sparsity", "bundling"))
    monkeypatch.setattr("flashinfer.study.activity.Study.open", refuse)
    figures = tmp_path / "x.json"
    arguments = ["--device", "rpi5-nvme", "--tokens", "256", "--json", str(figures)]
    assert main(["study", "all", *arguments]) == 0
    assert "sparsity is left out: no neuron is silent" in capsys.readouterr().err
    found = json.loads(figures.read_text())
    assert [one["name"] for one in found["findings"]] == ["bundling"]
    assert found["left_out"] == {"sparsity": "no neuron is silent"}
    assert main(["study", "sparsity", *arguments]) == 1


def refuse(study, **changes):
    raise UserError("no neuron is silent")


def test_wrong_arguments(capsys, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("x = 1\n")
    device = ["--device", "rpi5-nvme"]
    assert main(["study", "nothing"]) == 2
    assert main(["study", "sparsity", "--text", str(text), *device]) == 1
    assert "a.txt: has" in capsys.readouterr().err
    assert main(["study", "sparsity", "--text", str(tmp_path / "b.txt"), *device]) == 1
    assert "b.txt: No such file" in capsys.readouterr().err
    same = ["--text", str(text), "--html", str(text)]
    assert main(["study", "sparsity", *same, *device]) == 1
    assert "is what is read" in capsys.readouterr().err


def test_models_whose_neurons_all_fire_are_told(tmp_path):
    convert(DATA / "qwen3", tmp_path / "x.flash", "f32")
    profile = load(boards()["rpi5-nvme"])
    study = Study(tmp_path / "x.flash", [Sample("x", [5] * 30)], Options(context=32), profile)
    with pytest.raises(UserError, match="every neuron of this model fires"):
        list(activity(study, study.samples[0], "sparsity"))
