"""Weights that are read where they lie in GGUF files: the same bits as from a bundle of its own."""

import functools
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import keep_rows, logits_of
from flashinfer import BudgetError, FormatError, Model, UserError
from flashinfer.calibration.calibrate import calibrate
from flashinfer.formats.bundle.in_place import FILE_BYTES
from flashinfer.formats.bundle.reader import Bundle, verify
from flashinfer.formats.convert import convert
from flashinfer.formats.safetensors import SafetensorsFile
from flashinfer.formats.sources import names
from flashinfer.oracle.kits.configs import GGUF_MODELS
from flashinfer.oracle.kits.gguf_form import gguf_of
from flashinfer.oracle.kits.kit import write_kit
from flashinfer.oracle.model_weights import ModelWeights

MIXTURES = ["olmoe", "qwen2-moe", "qwen3-moe", "mixtral", "granitemoe", "gpt-oss"]
DENSE = ["llama", "qwen2", "phi3", "gemma", "falcon", "gpt2", "gpt-neox"]
OTHERS = ["deepseek-v3", "granite-hybrid", "nemotron-h-moe", "ernie4-5-moe"]
# An FFN's matrices, and of attention one, each in a number format of its own.
KINDS = {"ffn_gate": "Q4_0", "ffn_up": "Q5_1", "ffn_down": "Q8_0", "attn_output": "Q4_1"}
IDS = np.random.default_rng(4).integers(3, 96, 40)


def kind_of(name, values):
    import gguf

    found = [kind for part, kind in KINDS.items() if part in name]
    in_blocks = found and "inp" not in name and "shexp" not in name
    return gguf.GGMLQuantizationType[found[0]] if in_blocks else None


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directory of a conformance kit's checkpoints, whose rows are whole blocks."""
    pytest.importorskip("gguf")
    from make_gguf import ARCHITECTURES

    folder = tmp_path_factory.mktemp("kit") / "kit"
    write_kit(folder, sorted(ARCHITECTURES.keys() - {"bamboo", "nemotron", "mistral"}))
    return folder / "models"


@pytest.fixture
def made(models, tmp_path, monkeypatch):
    """Makes (a bundle of a GGUF file, one that has its weights there), however small they are."""
    monkeypatch.setattr(names, "WORTH_LEAVING", 0)

    def make(name, metadata=None, tensors_a_file=0):
        import gguf

        from make_gguf import write_gguf

        folder = tmp_path / "x"
        folder.mkdir()
        if tensors_a_file:
            writer = functools.partial(gguf.GGUFWriter, split_max_tensors=tensors_a_file)
            monkeypatch.setattr(gguf, "GGUFWriter", writer)
        write_gguf(models / f"gguf-{name}", folder / "x.gguf", kind_of, metadata)
        first = sorted(folder.glob("*.gguf"))[0]
        convert(first, tmp_path / "whole.flash")
        convert(first, folder / "x.flash", in_place=True)
        return tmp_path / "whole.flash", folder / "x.flash"

    return make


@pytest.fixture
def kit(tmp_path, monkeypatch):
    """Makes the same of a model of the kit in q4_0, without the gguf package."""
    monkeypatch.setattr(names, "WORTH_LEAVING", 0)

    def make(name):
        folder = tmp_path / "x"
        folder.mkdir()
        (folder / "x.gguf").write_bytes(kit_gguf(name))
        convert(folder / "x.gguf", tmp_path / "whole.flash")
        convert(folder / "x.gguf", folder / "x.flash", in_place=True)
        return tmp_path / "whole.flash", folder / "x.flash"

    return make


def kit_gguf(name, format="q4_0"):
    return gguf_of(next(m for m in GGUF_MODELS if m.name == f"gguf-{name}"), format)


def every_layer(path):
    """Whether every layer has an FFN."""
    with Bundle(path) as bundle:
        return len(bundle.config.with_neurons) == bundle.config.num_hidden_layers


def all_logits(path, mixture):
    """A prompt's logits, computed in every way: they should be the same."""
    found = [*logits_of(path, IDS), *logits_of(path, IDS, threads=3)]
    for io in ("buffered", "threads"):
        found += logits_of(path, IDS, io=io)
    for rows in (1, 3) if mixture and every_layer(path) else ():
        found += logits_of(path, IDS, rows)
    with Model.open(path) as model:  # some layers come from flash at every token
        for layer in () if mixture else model.layers[::2]:
            keep_rows(layer.feed_forward, 0, None)
        found.append(model.logits(IDS))
        model.reset()
        found.append(np.stack([model.forward([token]) for token in IDS]))
    with pytest.raises(BudgetError) as caught:
        Model.open(path, memory=1)
    return [*found, *logits_of(path, IDS, memory=caught.value.least)]


@pytest.mark.parametrize("name", [*MIXTURES, *DENSE, *OTHERS])
def test_the_same_bits(made, name, twin, constant_rss):
    whole, placed = made(name)
    with Bundle(whole) as a, Bundle(placed) as b:
        assert a.config == b.config and a.tensors.keys() == b.tensors.keys()
        elsewhere = [t for t in b.tensors.values() if t.offset >= FILE_BYTES]
        assert elsewhere and any(t.name.endswith("o_proj.weight") for t in elsewhere)
        assert all(b.bundles(i).offset >= FILE_BYTES for i in b.config.with_neurons)
        for tensor in a.tensors:
            assert np.array_equal(a.read(tensor), b.read(tensor))
    expected = logits_of(whole, IDS)[0]
    mixture = name not in DENSE
    assert all(np.array_equal(expected, found) for found in all_logits(placed, mixture))


@pytest.mark.parametrize("model", GGUF_MODELS, ids=lambda model: model.name)
def test_every_architecture(model, tmp_path, monkeypatch):
    """It has the same bits, or has nothing that could be left where it is."""
    monkeypatch.setattr(names, "WORTH_LEAVING", 0)
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_of(model, "q4_0"))
    convert(path, tmp_path / "whole.flash")
    try:
        convert(path, tmp_path / "x.flash", in_place=True)
    except UserError as error:
        assert "none of its feed-forward networks" in str(error)
        with Bundle(tmp_path / "whole.flash") as bundle:
            assert not any(layer.ffn.matrices for layer in bundle.config.layers)
        return
    expected = logits_of(tmp_path / "whole.flash", IDS)[0]
    found = [*logits_of(tmp_path / "x.flash", IDS)]
    with pytest.raises(BudgetError) as caught:
        Model.open(tmp_path / "x.flash", memory=1)
    found += logits_of(tmp_path / "x.flash", IDS, memory=caught.value.least)
    assert all(np.array_equal(expected, one) for one in found)


@pytest.mark.parametrize("tensors_a_file", [1, 5])
@pytest.mark.parametrize("name", ["olmoe", "qwen2"])
def test_a_model_in_several_files(made, name, tensors_a_file, constant_rss):
    whole, placed = made(name, tensors_a_file=tensors_a_file)
    with Bundle(placed) as bundle:
        assert len(bundle.in_place.files) > 3
    expected = logits_of(whole, IDS)[0]
    assert all(np.array_equal(expected, found) for found in all_logits(placed, name == "olmoe"))


@pytest.mark.parametrize("alignment", [1, 2, 64, 4096])
def test_tensors_that_begin_anywhere(made, alignment):
    """Floats that begin off the alignment of floats are not left in the file."""
    whole, placed = made("olmoe", metadata=lambda writer: writer.add_custom_alignment(alignment))
    with Bundle(placed) as bundle:
        left = [(t, bundle.tensors[t].format) for t in bundle.in_place.tensors]
        assert left and all(bundle.tensors[t].offset % 4 == 0 for t, f in left if f.name == "f32")
    (expected, _), found = logits_of(whole, IDS), [*logits_of(placed, IDS)]
    assert all(np.array_equal(expected, one) for one in found)


def test_small_matrices_are_not_left(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(kit_gguf("olmoe"))
    convert(path, tmp_path / "x.flash", in_place=True)
    with Bundle(tmp_path / "x.flash") as bundle:
        assert {name.split(".")[-1] for name in bundle.in_place.tensors} == {"bundles"}


def test_the_oracle_reads_the_same_weights(kit):
    whole, placed = kit("gpt-oss")
    with ModelWeights(whole) as ours, ModelWeights(placed) as theirs:
        for name in ours.specs:
            assert np.array_equal(ours[name], theirs[name])


def test_calibration_leaves_them_there(kit, tmp_path, cli):
    whole, placed = kit("qwen3-moe")
    ids = np.random.default_rng(5).integers(3, 96, 48 * 12)
    before, size = logits_of(placed, IDS)[0], placed.stat().st_size
    for path in (whole, placed):
        calibrate(path, ids, tokens=len(ids))
    with Bundle(whole) as a, Bundle(placed) as b:
        assert a.calibration == b.calibration is not None
        assert b.in_place.files
    assert placed.stat().st_size < size + 65536
    assert np.array_equal(before, logits_of(placed, IDS)[0])
    with pytest.raises(UserError, match=r"y\.flash: a bundle that has weights in x\.gguf lies"):
        calibrate(placed, ids, tmp_path / "y.flash", tokens=len(ids))
    assert verify(placed) == placed.stat().st_size
    code, out, _ = cli("verify", placed)
    assert code == 0 and "weights in x.gguf have no checksums" in out


def test_a_gguf_file_is_a_model(kit, tmp_path, cli):
    """Where a bundle is wanted, from Python and from the command line, by itself and as a draft."""
    whole, placed = kit("olmoe")
    source, companion = placed.with_name("x.gguf"), placed.with_name("x.gguf.flash")
    placed.unlink()
    with Model.open(source) as model:
        found = model.logits(IDS)
    assert companion.exists() and np.array_equal(found, logits_of(whole, IDS)[0])
    made_at = companion.stat().st_mtime_ns
    command = ["--tokens", "5,9,11", "-n", "6", "--temp", "0", "--ignore-eos"]
    _, expected, _ = cli("run", whole, *command)
    code, out, err = cli("run", source, *command, "--draft", source)
    assert code == 0 and out == expected, err
    assert companion.stat().st_mtime_ns == made_at
    companion.unlink()
    code, out, err = cli("run", source, *command)
    assert code == 0 and out == expected and companion.exists()
    for name in ("inspect", "verify"):
        assert cli(name, source)[0] == 0


def test_the_plan_says_that_it_need_not_be_converted(kit, cli):
    whole, placed = kit("olmoe")
    source, companion = placed.with_name("x.gguf"), placed.with_name("x.gguf.flash")

    def planned(path):
        code, out, err = cli("plan", path, "--device", "rpi5-nvme", "--json", "-")
        assert code == 0, err
        return json.loads(out)

    assert planned(source)["conversion"]["in_place"]
    placed.rename(companion)  # it is what a run would open
    found, same = planned(source), planned(companion)
    assert found["conversion"] is None and found["cost"] == same["cost"]
    assert companion.stat().st_size < found["bytes"] <= whole.stat().st_size
    _, out, _ = cli("inspect", source)
    assert " MB of it in x.gguf" in out


def test_what_cannot_be_left_is_one_line(kit, tmp_path, cli):
    whole, placed = kit("olmoe")
    source = placed.with_name("x.gguf")

    def refused(match, *command):
        code, _, err = cli(*command)
        assert code == 1 and match in err and err.count("\n") == 1, err

    refused("lies beside it", "convert", source, tmp_path / "y.flash", "--in-place")
    beside = placed.with_name("y.flash")
    refused("leave --dtype away", "convert", source, beside, "--in-place", "--dtype", "q8_0")
    refused("is for GGUF files", "convert", whole, beside, "--in-place")
    dense, floats = tmp_path / "dense.gguf", tmp_path / "floats.gguf"
    dense.write_bytes(kit_gguf("qwen2"))
    refused("none of its feed-forward networks", "convert", dense, tmp_path / "y.flash",
            "--in-place", "--activation", "relu")  # fmt: skip
    floats.write_bytes(kit_gguf("qwen2", "f32"))
    refused("without --in-place", "run", floats, "--tokens", "5")
    assert not beside.exists() and not (tmp_path / "floats.gguf.flash").exists()


def test_another_file_is_one_line(kit):
    _, placed = kit("olmoe")
    source = placed.with_name("x.gguf")
    raw = source.read_bytes()

    def refused(match):
        with pytest.raises(FormatError, match=match) as caught:
            Bundle(placed)
        assert "\n" not in str(caught.value)

    source.write_bytes(raw[:-1])
    refused("is another file than")
    source.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    refused("is another file than")
    source.unlink()
    refused("has weights there")
    source.mkdir()
    refused("is a directory")
    source.rmdir()
    os.mkfifo(source)
    refused("not a regular file")
    source.unlink()
    source.write_bytes(raw)
    with Model.open(placed, memory="1G") as model:  # cut while it is read
        os.truncate(source, 4096)
        for layer in model.layers:
            keep_rows(layer.feed_forward, 1, None)
        with pytest.raises(FormatError, match=r"x\.gguf: reading \d+ bytes at \d+: the file ends"):
            model.logits(IDS)


VALUES = st.one_of(
    st.none(), st.booleans(), st.text(max_size=3), st.floats(), st.just([]), st.just({}),
    st.integers(-1, 1 << 50), st.sampled_from([FILE_BYTES, 2 * FILE_BYTES, 1 << 63, 1 << 70]),
    st.sampled_from(["../x.gguf", "/etc/passwd", "x.gguf\0", ".", "f32", "q4_0,q4_0", "0" * 64]),
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_what_a_bundle_says_of_other_files_is_untrusted(small, data):
    """Whatever it says: one line, or a model that runs without reading elsewhere."""
    placed, stated, path = small
    changed = json.loads(json.dumps(stated))
    for _ in range(data.draw(st.integers(1, 3))):
        at, key = changed, None
        while isinstance(at, (dict, list)) and len(at):
            keys = list(at) if isinstance(at, dict) else range(len(at))
            held, key = at, data.draw(st.sampled_from(keys))
            at = held[key]
            if data.draw(st.integers(0, 3)) == 0:
                break
        if key is not None:
            held[key] = data.draw(VALUES)
    rewrite(placed, changed, path)
    try:
        with Model.open(path) as model:
            model.logits(IDS[:3])
    except UserError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(a bundle with weights in a GGUF file, what it says of it, where another may be written)."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "x.gguf").write_bytes(kit_gguf("olmoe"))
    convert(folder / "x.gguf", folder / "x.flash", in_place=True)
    with Bundle(folder / "x.flash") as bundle:
        return folder / "x.flash", bundle.in_place.as_json(), folder / "y.flash"


def rewrite(placed, stated, path):
    """The bundle at ``placed``, with something else said of other files, at ``path``."""
    shutil.copy(placed, path)
    with SafetensorsFile(placed) as file:
        length = file.header_bytes
        header = json.loads(bytes(file.read_bytes(8, length)))
    header["__metadata__"]["flashinfer.in_place"] = json.dumps(stated)
    text = json.dumps(header).encode()
    raw = placed.read_bytes()[8 + length :]
    text = text.ljust(-(-(len(text) + 8) // 4096) * 4096 - 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw)
