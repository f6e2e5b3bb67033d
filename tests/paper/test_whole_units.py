"""Units whose matrices lie as a GGUF file had them: kept byte for byte, and the same bits whatever
stays in DRAM."""

from dataclasses import replace

import numpy as np
import pytest

from conftest import keep_rows, logits_of
from flashinfer import BudgetError, FormatError, Model, UserError
from flashinfer.calibration.calibrate import calibrate
from flashinfer.formats.bundle.reader import Bundle, verify
from flashinfer.formats.bundle.writer import stored_tensors, write_bundle
from flashinfer.formats.convert import convert
from flashinfer.formats.number_formats import Matrices
from flashinfer.formats.sources.gguf import GgufFile
from flashinfer.oracle.kits.kit import write_kit
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.plan import profile
from flashinfer.plan.options import Options
from flashinfer.study.activity import Sample, Study, activity

gguf = pytest.importorskip("gguf")

from make_gguf import ARCHITECTURES, random_olmoe, random_qwen2, write_gguf  # noqa: E402

Q = gguf.GGMLQuantizationType
MIXTURES = ["olmoe", "qwen2-moe", "qwen3-moe", "mixtral", "granitemoe", "gpt-oss"]
DENSE = ["llama", "qwen2", "qwen3", "phi3", "phi", "gemma", "falcon", "gpt2", "gpt-neox"]
PARTS = {"gate": Q.Q4_0, "up": Q.Q5_1, "down": Q.Q8_0}


def kind_of(name, values):
    """Another number format for each matrix of the FFN."""
    found = [kind for part, kind in PARTS.items() if f"ffn_{part}" in name]
    return found[0] if found and "inp" not in name and "shexp" not in name else None


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directory of a conformance kit's checkpoints, whose rows are whole blocks."""
    folder = tmp_path_factory.mktemp("kit") / "kit"
    write_kit(folder, sorted(ARCHITECTURES.keys() - {"bamboo", "nemotron", "mistral"}))
    return folder / "models"


@pytest.fixture
def made(models, tmp_path):
    """Makes (a GGUF file of mixed number formats, the bundle that is made of it)."""

    def make(name, folder=tmp_path):
        path = write_gguf(models / f"gguf-{name}", folder / "x.gguf", kind_of)
        convert(path, folder / "x.flash")
        return path, folder / "x.flash"

    return make


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2-moe"])
def test_experts_whose_gates_may_be_shut(models, name, tmp_path):
    """A token by itself has the bits that it has among others, where a gate is a ReLU."""
    path = write_gguf(models / f"gguf-{name}", tmp_path / "x.gguf", kind_of)
    convert(path, tmp_path / "x.flash", activation="relu")
    with Bundle(tmp_path / "x.flash") as bundle:
        assert all(k.ffn.matrices and k.ffn.sparse for k in bundle.config.layers)
    with pytest.raises(BudgetError) as caught:
        Model.open(tmp_path / "x.flash", memory=1)
    for options in ({}, {"rows": 1}, {"memory": caught.value.least}):
        whole, single = logits_of(tmp_path / "x.flash", np.arange(3, 33), **options)
        assert np.array_equal(whole, single) and np.isfinite(whole).all()


@pytest.mark.parametrize("name", [*MIXTURES, *DENSE])
def test_every_byte_is_kept(made, name, tmp_path):
    source, path = made(name)
    verify(path)
    with GgufFile(source) as file, Bundle(path) as bundle:
        for i, layer in enumerate(bundle.config.layers):
            stored, ffn = bundle.bundles(i), layer.ffn
            assert ffn.matrices and isinstance(stored.format, Matrices)
            raw = bundle.raw(stored)
            for part, described in stored.format.parts.items():
                name_there = f"blk.{i}.ffn_{part}{'_exps' if ffn.router else ''}.weight"
                if name_there not in file.tensors:  # gate and up in one
                    name_there = f"blk.{i}.ffn_up.weight"
                theirs = file.raw_rows(name_there).reshape(stored.rows, -1)
                ours = raw[:, described.at : described.at + described.nbytes]
                begin = described.nbytes if theirs.size > ours.size and part == "up" else 0
                assert np.array_equal(ours, theirs[:, begin : begin + described.nbytes])
                kind = file.tensors[name_there].type
                assert described.format is kind.format
            assert not raw[:, sum(p.nbytes for p in stored.format.parts.values()) :].any()


@pytest.mark.parametrize(
    "kinds", [(Q.Q4_K, Q.Q4_K, Q.Q6_K), (Q.Q5_K, Q.Q3_K, Q.Q2_K), (Q.IQ4_XS, Q.IQ4_NL, Q.Q8_0)]
)
@pytest.mark.parametrize("make", [random_olmoe, random_qwen2])
def test_k_quants(make, kinds, tmp_path, twin):
    """As people download them: every byte is kept, and no bit depends on what stays in DRAM."""
    parts = dict(zip(("gate", "up", "down"), kinds, strict=True))

    def kind(name, values):
        found = [k for part, k in parts.items() if f"ffn_{part}" in name and "inp" not in name]
        return found[0] if found else Q.Q4_K if "norm" not in name and "inp" not in name else None

    source = write_gguf(make(tmp_path / "hf"), tmp_path / "x.gguf", kind)
    path = tmp_path / "x.flash"
    convert(source, path)
    verify(path)
    with GgufFile(source) as file, Bundle(path) as bundle:
        kept = {tensor.format.name for tensor in bundle.tensors.values() if tensor.rows > 1}
        assert "q4_K" in kept
        stored, router = bundle.bundles(0), bundle.config.layers[0].ffn.router
        raw = bundle.raw(stored)
        for part, described in stored.format.parts.items():
            theirs = file.raw_rows(f"blk.0.ffn_{part}{'_exps' if router else ''}.weight")
            ours = raw[:, described.at : described.at + described.nbytes]
            assert np.array_equal(ours, theirs.reshape(stored.rows, -1))
            assert described.format.name.upper() == parts[part].name
    ids = np.random.default_rng(4).integers(3, 40, 30)
    whole, single = logits_of(path, ids)
    found = [single, *logits_of(path, ids, threads=2)]
    for rows in (1, 3) if router else ():
        found += logits_of(path, ids, rows)
    assert all(np.array_equal(whole, other) for other in found)


@pytest.mark.parametrize("name", [*MIXTURES, *DENSE])
def test_the_logits_are_those_of_the_decoded_weights(made, name, tmp_path, twin):
    """But for activations, which are rounded to 8 bits."""
    source, path = made(name)
    convert(source, tmp_path / "f32.flash", "f32")
    ids = np.random.default_rng(4).integers(3, 96, 20)
    (found, _), (exact, _) = logits_of(path, ids), logits_of(tmp_path / "f32.flash", ids)
    # Of a mixture a token may choose another expert.
    assert np.median(np.abs(found - exact)) < 0.02 * np.abs(exact).mean()


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_change_no_bit(made, name, tmp_path, twin, constant_rss):
    """Caches of one expert to all, threads, ways to read, the least budget."""
    _, path = made(name)
    ids = np.random.default_rng(4).integers(3, 96, 40)
    whole, single = logits_of(path, ids)
    found = [single, *logits_of(path, ids, threads=3), *logits_of(path, ids, io="buffered")]
    for rows in (1, 2, 3, 5, 7):
        for window in (None, 2):
            found += logits_of(path, ids, rows, window=window)
    with pytest.raises(BudgetError) as caught:
        Model.open(path, memory=1)
    found += logits_of(path, ids, memory=caught.value.least)
    assert all(np.array_equal(whole, other) for other in found)


@pytest.mark.parametrize("name", DENSE)
def test_streamed_or_not_changes_no_bit(made, name, tmp_path, twin, constant_rss):
    _, path = made(name)
    ids = np.random.default_rng(4).integers(3, 96, 40)
    whole, single = logits_of(path, ids)
    found = [single, *logits_of(path, ids, threads=3), *logits_of(path, ids, io="buffered")]
    for streamed in ((0,), (1,), (0, 1)):
        with Model.open(path) as model:
            for i in streamed:
                keep_rows(model.layers[i].feed_forward, 0, None)
            read = model.flash.bytes_read
            found.append(model.logits(ids))
            tensors = [model.bundle.bundles(i) for i in streamed]
            assert model.flash.bytes_read - read >= 0.9 * sum(t.nbytes - 4096 for t in tensors)
            model.reset()
            found.append(np.stack([model.forward([token]) for token in ids]))
    with pytest.raises(BudgetError) as caught:
        Model.open(path, memory=1)
    found += logits_of(path, ids, memory=caught.value.least)
    assert all(np.array_equal(whole, other) for other in found)


@pytest.mark.parametrize("name", ["olmoe", "llama"])
def test_drafts_and_batches_change_no_token(made, name, tmp_path):
    _, path = made(name)
    prompts = [[5, 9, 5, 9, 5, 9], [7, 8, 9], [11] * 8]
    with Model.open(path, draft="off") as model:
        alone = []
        for prompt in prompts:
            model.reset()
            alone.append(list(model.generate(prompt, 24, 0, stop_at_eos=False)))
    with Model.open(path, draft="ngram") as model:
        for prompt, text in zip(prompts, alone, strict=True):
            model.reset()
            assert list(model.generate(prompt, 24, 0, stop_at_eos=False)) == text
    with Model.open(path, texts=3) as model:
        written = model.generate_many(prompts, 24, 0, stop_at_eos=False)
        assert sorted(w.token_ids for w in written) == sorted(alone)


def test_a_dtype_gives_bundles_and_a_relu_too(made, tmp_path):
    """Where a format is asked for, or neurons may be silent, neurons are read one by one."""
    source, _ = made("llama")
    convert(source, tmp_path / "y.flash", "q4_0")
    convert(source, tmp_path / "z.flash", activation="relu")
    for path in ("y.flash", "z.flash"):
        with Bundle(tmp_path / path) as bundle:
            assert not any(layer.ffn.matrices for layer in bundle.config.layers)


def test_calibration(made, tmp_path, cli):
    """A mixture's experts are counted as always; thresholds need neurons by themselves."""
    (tmp_path / "dense").mkdir()
    _, path = made("qwen3-moe")
    ids = np.random.default_rng(5).integers(3, 96, 48 * 12)
    calibrate(path, ids, tmp_path / "y.flash", tokens=len(ids))
    first = logits_of(path, ids[:20])[0]
    assert np.array_equal(first, logits_of(tmp_path / "y.flash", ids[:20])[0])
    verify(tmp_path / "y.flash")
    code, out, _ = cli("inspect", tmp_path / "y.flash")
    assert code == 0 and "q4_0,q5_1,q8_0" in out
    _, dense = made("llama", tmp_path / "dense")
    with pytest.raises(UserError, match="convert it with --dtype"):
        calibrate(dense, ids, target_sparsity=0.5)


@pytest.mark.parametrize(
    "formats", ["q4_0,", "q4_0,q5_1", "q4_0,q5_1,none", "q2_K,q5_1,q8_0", ",,"]
)
def test_wrong_formats_are_one_line(made, formats, tmp_path):
    _, path = made("llama")
    with Bundle(path) as bundle:
        tensors = [
            replace(tensor, format=formats) if tensor.name.endswith("ffn.bundles") else tensor
            for tensor in stored_tensors(bundle)
        ]
        write_bundle(tmp_path / "y.flash", tensors, bundle.hf_config, bundle.source)
    with pytest.raises(FormatError, match=r"y\.flash: ") as caught:
        Bundle(tmp_path / "y.flash")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "olmoe"])
def test_the_oracle_reads_the_same_weights(made, name):
    """From the bundle and from the GGUF file, each matrix in its number format."""
    source, path = made(name)
    with ModelWeights(source) as theirs, ModelWeights(path) as ours:
        for i in range(len(ours.config.layers)):
            bundles = f"layers.{i}.ffn.bundles"
            assert np.array_equal(ours[bundles], theirs[bundles])
            for part, kind in PARTS.items():
                assert ours.format(bundles, part) == theirs.format(bundles, part)
                assert ours.format(bundles, part) == kind.name.lower()


def test_the_plan_knows_its_speed(made, tmp_path):
    """Products of each part by its own number format."""
    _, path = made("olmoe")
    with Model.open(path, device="rpi5-nvme") as model:
        assert model.expected is not None and model.expected.total > 0


def test_the_study_counts_experts(made):
    """Those that the router chooses, of a mixture whose experts are matrices."""
    _, path = made("olmoe")
    ids = np.random.default_rng(4).integers(3, 96, 40)
    study = Study(path, [Sample("x", ids)], Options(context=48), profile.find("rpi5-nvme", path))
    with Bundle(path) as bundle:
        ffns = [layer.ffn for layer in bundle.config.layers]
    for used, ffn in zip(activity(study, study.samples[0], "x"), ffns, strict=True):
        assert used.units == ffn.experts and used.tokens == len(ids)
        assert used.share == pytest.approx(ffn.routed_units / ffn.experts)
