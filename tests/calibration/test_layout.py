"""Neurons that lie in another order: no bit changes, and those that fire together are read so."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from drafting import drafting
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA, keep_rows
from flashinfer import BudgetError, Model, UserError
from flashinfer.calibration.calibrate import calibrate
from flashinfer.calibration.coactivation import lay_out, path, places_of
from flashinfer.course import engine
from flashinfer.formats.bundle.layout import places_name
from flashinfer.formats.bundle.reader import Bundle, verify
from flashinfer.formats.bundle.writer import NewTensor, laid_out, stored_tensors, write_bundle
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError
from flashinfer.formats.safetensors import SafetensorsFile
from flashinfer.generation.batch import Request
from flashinfer.generation.sampling import Sampler
from flashinfer.paper.feedforward import FeedForward
from flashinfer.paper.ways import CACHED, STREAMED, WAVES, WHOLE
from flashinfer.plan import profile
from flashinfer.plan.options import Options
from flashinfer.study.activity import Sample, Study
from flashinfer.study.experiments.failed import chosen

IDS = np.random.default_rng(2).integers(3, 96, 40)


def sizes(path):
    with Bundle(path) as bundle:
        return [layer.ffn.neurons for layer in bundle.config.layers]


def moved(source, target, places):
    """A copy of a bundle whose neurons lie at ``places``; None: by their numbers."""
    with Bundle(source) as bundle:
        kept = stored_tensors(bundle, lambda name: not name.endswith(".places"))
        tensors = laid_out(bundle, kept, None if places is None else dict(enumerate(places)))
        write_bundle(target, tensors, bundle.hf_config, bundle.source, bundle.calibration)
    verify(target)
    return target


def shuffled(source, target, seed=0):
    random = np.random.default_rng(seed)
    return moved(source, target, [random.permutation(n) for n in sizes(source)])


@pytest.fixture(scope="module", params=["opt", "large", "gated"])
def pair(request, tmp_path_factory):
    """A calibrated bundle, and the same with its neurons in any order."""
    folder = tmp_path_factory.mktemp("pair")
    if request.param == "gated":
        source = folder / "gated.flash"
        convert(DATA / "prosparse", source, "f16")
        calibrate(source, np.random.default_rng(5).integers(3, 90, 600), tokens=600, steps=2)
    else:
        fixture = {"opt": "calibrated", "large": "synthetic"}[request.param]
        source = request.getfixturevalue(fixture)
    return source, shuffled(source, folder / "shuffled.flash")


def bits(path, rows=None, ids=IDS, **options):
    """(logits of a prompt, and of its tokens one by one; the ways that layers ran)."""
    ways, way = set(), FeedForward.way

    def noted(ffn, selection, tokens):
        ways.add(way(ffn, selection, tokens))
        return way(ffn, selection, tokens)

    with pytest.MonkeyPatch.context() as patch, Model.open(path, **options) as model:
        patch.setattr(FeedForward, "way", noted)
        for layer in model.layers if rows else ():
            keep_rows(layer.feed_forward, rows, options.get("window"))
        whole = model.logits(ids)
        model.reset()
        single = np.stack([model.forward([token]) for token in ids])
    return whole, single, ways


def assert_same(pair, **options):
    (*expected, _), (*found, ways) = (bits(path, **options) for path in pair)
    for a, b in zip(expected, found, strict=True):
        assert a.tobytes() == b.tobytes()
    return ways


def test_no_bit_changes_whatever_way_layers_run(pair, twin):
    n = min(sizes(pair[0]))
    ids = IDS[:12]
    ways = assert_same(pair, ids=ids)
    for rows, window in itertools.product((n // 20, n // 2, n - 1), (None, 2)):
        ways |= assert_same(pair, rows=rows, window=window, ids=ids)
    ways |= assert_same(pair, rows=n // 2, neurons="dense", ids=ids)
    assert ways == {WHOLE, STREAMED, CACHED, WAVES}


@pytest.mark.parametrize("options", [
    {}, {"neurons": "dense"}, {"window": 3}, {"io": "buffered"}, {"io": "threads", "threads": 3},
    {"cache": "lru"},
])  # fmt: skip
def test_no_bit_changes_from_the_least_budget_on(pair, constant_rss, options):
    for more in (0, 1 << 20, 4 << 20):
        budgets = []
        for file in pair:
            with pytest.raises(BudgetError) as caught:
                Model.open(file, memory=1, context=48, **options)
            budgets.append(caught.value.least + more)
        assert len(set(budgets)) == 1
        assert_same(pair, memory=budgets[0], context=48, **options)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99), rows=st.integers(1, 72), window=st.sampled_from([None, 1, 5]),
    neurons=st.sampled_from(["predicted", "dense"]), cut=st.integers(0, 40),
)  # fmt: skip
def test_any_order_and_any_cache_give_the_same_bits(
    calibrated, tmp_path_factory, seed, rows, window, neurons, cut
):
    file = shuffled(calibrated, tmp_path_factory.mktemp("any") / "x.flash", seed)
    found = []
    for each in (calibrated, file):
        with Model.open(each, neurons=neurons, window=window) as model:
            for layer in model.layers:
                keep_rows(layer.feed_forward, rows, window)
            pieces = [part for part in (IDS[:cut], IDS[cut:]) if len(part)]
            found.append(b"".join(model.forward(part).tobytes() for part in pieces))
    assert found[0] == found[1]


def test_drafts_and_batches_write_the_same_tokens(pair):
    written = []
    for file in pair:
        with Model.open(file, context=48) as model:
            for layer in model.layers:
                keep_rows(layer.feed_forward, 40, None)
            drafting(model)
            alone = list(model.generate(IDS[:9], 20, temperature=0, stop_at_eos=False))
        with Model.open(file, context=48, texts=4) as model:
            for layer in model.layers:
                keep_rows(layer.feed_forward, 40, None)
            asked = [
                Request(n, IDS[n : n + 5 + n].tolist(), 9, Sampler(0.8, seed=n)) for n in range(7)
            ]
            together = {done.request.number: done.token_ids for done in model.write(asked)}
        written.append((alone, together))
    assert written[0] == written[1] and len(written[0][0]) == 20


@pytest.mark.parametrize("neurons", ["predicted", "dense"])
def test_traces_are_the_same(cli, pair, tmp_path, neurons):
    found = []
    for number, file in enumerate(pair):
        target = tmp_path / f"{number}.safetensors"
        command = ["trace", file, "--tokens", "5,7,9,11", "--neurons", neurons, "-o", target]
        code, _, err = cli(*command)
        assert code == 0, err
        with SafetensorsFile(target) as trace:
            found.append({i.name: trace.read_bytes(i.offset, i.nbytes).tobytes()
                          for i in trace.tensors.values()})  # fmt: skip
    assert found[0] == found[1] and len(found[0]) > 5


def test_what_reads_the_whole_layer_finds_neurons_by_their_numbers(pair):
    with Bundle(pair[0]) as plain, Bundle(pair[1]) as other:
        assert other.has_layout and not plain.has_layout
        name = plain.bundles(1).name
        assert np.array_equal(plain.read(name), other.read(name))
        stored = other.bundles(1)
        raw = other.file.read_bytes(stored.offset, stored.nbytes).reshape(stored.rows, -1)
        again = plain.file.read_bytes(plain.bundles(1).offset, stored.nbytes)
        assert np.array_equal(raw, again.reshape(raw.shape)[stored.order()])


# ---------------------------------------------------------------------- the path


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), groups=st.integers(1, 6), each=st.integers(1, 6))
def test_a_path_keeps_together_what_fires_together(seed, groups, each):
    """Units that always fire together, and never with others, lie side by side."""
    random = np.random.default_rng(seed)
    group = random.permutation(np.repeat(np.arange(groups), each))
    fires = random.random((200, groups)) < 0.3
    order = path(np.packbits(fires[:, group].T, axis=1))
    assert sorted(order) == list(range(groups * each))
    assert np.count_nonzero(np.diff(group[order])) <= groups - 1 or not fires.any(axis=0).all()
    assert np.array_equal(np.argsort(places_of(order)), order)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), units=st.integers(0, 30), tokens=st.integers(0, 90))
def test_a_path_takes_the_best_step_that_is_left(seed, units, tokens):
    """By the definition, step by step."""
    used = np.random.default_rng(seed).random((units, tokens)) < 0.2
    order = path(np.packbits(used, axis=1)).tolist()
    assert sorted(order) == list(range(units))
    counts = used.sum(axis=1)
    if units:
        assert counts[order[0]] == counts.max()
    for at in range(1, units):
        last, rest = order[at - 1], order[at:]
        both = [np.count_nonzero(used[last] & used[unit]) for unit in rest]
        shares = [b / max(1, counts[last] + counts[unit] - b)
                  for b, unit in zip(both, rest, strict=True)]  # fmt: skip
        best = max(shares)
        worth = shares if best > 0 else [counts[unit] for unit in rest]
        assert worth[0] == max(worth)


def test_neurons_that_fire_together_take_fewer_reads():
    random = np.random.default_rng(3)
    group = random.permutation(np.repeat(np.arange(64), 8))
    fires = random.random((1024, 64)) < 0.05
    found = lay_out(np.packbits(fires[:, group].T, axis=1), 1024, 8192)
    assert sorted(found.places) == list(range(512))
    assert found.reads < 0.3
    alone = random.random((1024, 512)) < 0.05  # and those that fire anyhow as many as anywhere
    assert lay_out(np.packbits(alone.T, axis=1), 1024, 8192).reads == pytest.approx(1, abs=0.1)


def test_the_demo_model_takes_fewer_reads(tmp_path):
    """Along a path through what its predictors name in a text that is not the one that is read."""
    ids = engine.text(first=256, tokens=1024)
    device = profile.load(profile.boards()[engine.DEVICE])
    traces = chosen(Study(engine.DEMO, [Sample("text", ids)], Options(draft="off"), device))
    places = []
    for trace, units in zip(traces, sizes(engine.DEMO), strict=True):
        used = np.stack([np.isin(np.arange(units), selection.units) for selection in trace])
        places.append(lay_out(np.packbits(used.T, axis=1), len(trace), 1024).places)
    file, runs = moved(engine.DEMO, tmp_path / "x.flash", places), []
    for each in (engine.DEMO, file):
        with engine.opened(each) as model:
            runs.append(engine.run(model, engine.text(tokens=256)))
    assert runs[0].digest == runs[1].digest
    assert runs[1].reads < 0.95 * runs[0].reads and runs[1].nbytes < 0.95 * runs[0].nbytes


# ---------------------------------------------------------------------- calibrate


def test_calibrate_again_and_back(plain, tmp_path):
    ids = np.random.default_rng(5).integers(3, 96, 700)
    how = {"tokens": 700, "steps": 2, "text": "random"}
    trained, together, again, back = (tmp_path / f"{n}.flash" for n in range(4))
    first = calibrate(plain, ids, trained, **how)
    found = calibrate(plain, ids, together, layout="coactivation", **how)
    assert calibrate(together, ids, again, layout="coactivation", **how) == found
    assert calibrate(again, ids, back, **how) == first
    assert again.read_bytes() == together.read_bytes()
    assert back.read_bytes() == trained.read_bytes() != together.read_bytes()
    with Bundle(together) as bundle:
        verify(together)
        assert bundle.calibration == found and bundle.has_layout
        assert all(layer.reads > 0 for layer in found.layers)
        orders = [bundle.bundles(i).places.tolist() for i in range(2)]
    assert all(order != sorted(order) for order in orders)
    assert all(layer.reads is None for layer in first.layers)
    for neurons in ("predicted", "dense"):
        assert_same((trained, together), neurons=neurons)
    other = np.random.default_rng(6).integers(3, 96, 700)
    calibrate(together, other, layout="coactivation", **how)  # in its own place, by another text
    with Bundle(together) as bundle:
        assert [bundle.bundles(i).places.tolist() for i in range(2)] != orders
    assert_same((trained, together), neurons="dense")


def test_the_command_and_inspect(cli, plain, tmp_path):
    text, target = tmp_path / "x.txt", tmp_path / "x.flash"
    text.write_text("to be or not to be, that is the question " * 200)
    code, _, err = cli("calibrate", plain, "--text", text, "--layout", "any", "-o", target)
    assert code == 2 and "--layout" in err
    calibrate(plain, np.arange(3, 96).repeat(8), target, steps=0, layout="coactivation")
    code, out, _ = cli("inspect", target)
    assert code == 0 and "layout: coactivation" in out
    assert json.loads(cli("inspect", target, "--json", "-")[1])["layout"] == "coactivation"
    assert json.loads(cli("inspect", plain, "--json", "-")[1])["layout"] == "trained"


def test_mixtures_and_unknown_layouts_are_refused(plain, tmp_path):
    file = tmp_path / "x.flash"
    convert(DATA / "olmoe", file, "f32")
    for source, layout, says in (
        (file, "coactivation", r"x\.flash: the experts of a mixture lie in their order"),
        (plain, "sorted", "'sorted' is not one of trained, coactivation"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            calibrate(source, IDS, layout=layout)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- hostile files


def with_places(source, target, *tensors):
    """A copy of a bundle with these tensors: (layer, dtype, values)."""
    new = [
        NewTensor(places_name(layer), dtype, values.shape, values.nbytes,
                  lambda values=values: [np.ascontiguousarray(values).view(np.uint8).reshape(-1)])
        for layer, dtype, values in tensors
    ]  # fmt: skip
    with Bundle(source) as bundle:
        write_bundle(target, [*stored_tensors(bundle), *new], bundle.hf_config, bundle.source)
    return target


def test_places_that_are_no_permutation(plain, tmp_path):
    good = np.arange(72, dtype=np.int32)[::-1].copy()

    def changed(at, value):
        wrong = good.copy()
        wrong[at] = value
        return wrong

    hostile = {
        "missing, and other layers have one": [(0, "I32", good)],
        "a permutation: no neuron lies at 71": [(0, "I32", changed(0, 0)), (1, "I32", good)],
        "a permutation: no neuron lies at 0": [(0, "I32", good), (1, "I32", changed(71, 72))],
        "a permutation: no neuron lies at 66": [(0, "I32", changed(5, -1)), (1, "I32", good)],
        "a permutation: no neuron lies at 65": [(0, "I32", changed(6, -(2**31))), (1, "I32", good)],
        r"is I32 \(71,\), the config says I32 \(72,\)": [(0, "I32", good[:71]), (1, "I32", good)],
        r"is I32 \(72, 1\)": [(0, "I32", good[:, None]), (1, "I32", good)],
        r"is I64 \(72,\)": [(0, "I64", good.astype(np.int64)), (1, "I32", good)],
        r"is F32 \(72,\)": [(0, "F32", good.astype(np.float32)), (1, "I32", good)],
        r"is I32 \(0,\)": [(0, "I32", good[:0]), (1, "I32", good)],
    }
    for says, tensors in hostile.items():
        file = with_places(plain, tmp_path / "x.flash", *tensors)
        with pytest.raises(FormatError, match=says) as caught:
            Bundle(file)
        assert "x.flash: tensor layers." in str(caught.value) and "\n" not in str(caught.value)
    sound = with_places(plain, tmp_path / "x.flash", (0, "I32", good), (1, "I32", good))
    with Bundle(sound) as bundle:
        assert bundle.has_layout


def test_places_of_experts(tmp_path):
    source, good = tmp_path / "mixture.flash", np.arange(1, dtype=np.int32)
    convert(DATA / "olmoe", source, "f32")
    file = with_places(
        source, tmp_path / "x.flash", *[(i, "I32", good) for i in range(len(sizes(source)))]
    )
    with pytest.raises(FormatError, match="the experts of a mixture lie in their order"):
        Bundle(file)


# ---------------------------------------------------------------------- the plan


@pytest.mark.parametrize("options", [{"neurons": "dense"}, {}])
def test_the_plan_expects_the_reads_that_come(synthetic, tmp_path, constant_rss, options):
    """Of a layer that streams, tile by tile; and of missing neurons where they lie anyhow."""
    file = shuffled(synthetic, tmp_path / "x.flash")
    device = profile.find("laptop-nvme", file)
    how = {"context": 256, "device": device, "draft": "off", **options}
    with pytest.raises(BudgetError) as caught:
        Model.open(file, memory=1, **how)
    with Model.open(file, memory=caught.value.least + (1 << 20), **how) as model:
        list(model.generate([5 + 7 * i % 2900 for i in range(60)], 60, temperature=0,
                            stop_at_eos=False))  # fmt: skip
        figures, flash = model.stats.as_dict(), model.flash
        begin = flash.reads
        for token in range(20, 40):
            model.forward([token])
        reads = (flash.reads - begin) / 20
        expected = model.expected
    nbytes = figures["expected_flash_bytes_per_token"]
    assert figures["flash_bytes_per_token"] == pytest.approx(nbytes, rel=0.25)
    assert reads == pytest.approx(expected.requests, rel=0.25)


def test_fewer_reads_are_expected_where_calibration_found_them(synthetic, tmp_path, constant_rss):
    with Bundle(synthetic) as bundle:
        layers = tuple(replace(layer, reads=0.5) for layer in bundle.calibration.layers)
        found = replace(bundle.calibration, layers=layers)
    file, half = shuffled(synthetic, tmp_path / "a.flash"), tmp_path / "b.flash"
    with Bundle(file) as bundle:
        write_bundle(half, stored_tensors(bundle), bundle.hf_config, bundle.source, found)
    device, requests = profile.find("laptop-nvme", file), []
    for each in (file, half):
        with pytest.raises(BudgetError) as caught:
            Model.open(each, memory=1, context=64)
        budget = caught.value.least + (2 << 20)
        with Model.open(each, memory=budget, context=64, device=device, draft="off") as model:
            requests.append(model.expected.requests)
    assert requests[1] == pytest.approx(requests[0] / 2, rel=0.05) and requests[0] > 0
