"""Latent attention: whatever way a text takes through it, and wherever its weights are, a token has
the same bits; and what is kept of a token is as small as it should be."""

import json

import numpy as np
import pytest
from drafting import Known, drafting
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import CONTEXT, drafted, share_passes, taken_back_anywhere

from conftest import DATA
from flashinfer import BudgetError, Model
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import convert, outline
from flashinfer.formats.layers.latent_attention import LatentAttentionConfig
from flashinfer.formats.number_formats import FORMATS
from flashinfer.formats.safetensors import SafetensorsFile
from flashinfer.kernels import Matrix
from flashinfer.oracle.kits.configs import KitModel, latent
from flashinfer.oracle.kits.hugging_face_form import write_hugging_face
from flashinfer.transformer.kv_cache import KV_DTYPES, LatentCache
from flashinfer.transformer.kv_flash import may_lie_on_flash
from flashinfer.transformer.mixer import MemoryWanted
from flashinfer.transformer.mixers import kind_of
from flashinfer.transformer.weights import LinearOfHeads

MIB = 1 << 20
IDS = np.random.default_rng(0).integers(3, 96, 44).tolist()
# Large enough that a tile of the stream ends within a head's rows.
LARGE = latent(
    "deepseek_v3", hidden_size=256, num_attention_heads=8, num_key_value_heads=8, kv_lora_rank=512,
    q_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64, intermediate_size=256,
    moe_intermediate_size=32, first_k_dense_replace=1, n_group=1, topk_group=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A bundle of a small model."""
    target = tmp_path_factory.mktemp("latent") / "x.flash"
    convert(DATA / "deepseek-v3", target, "f32")
    return target


@pytest.fixture(scope="module", params=["f16", "q8_0", "q4_0"])
def large(tmp_path_factory, request):
    """A bundle of a model whose projections stream in several tiles, and its number format."""
    folder = tmp_path_factory.mktemp("large")
    write_hugging_face(KitModel("large", LARGE), folder)
    convert(folder, folder / "x.flash", request.param)
    return folder / "x.flash", request.param


@pytest.fixture(scope="module")
def expected(path):
    """The logits of IDS (T, vocab_size)."""
    with Model.open(path, context=CONTEXT, draft="off") as model:
        return model.logits(IDS)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_however_many_tokens_a_pass_takes(path, dtype, twin):
    with Model.open(path, context=CONTEXT, kv_dtype=dtype) as model:
        whole = model.logits(IDS)
        for sizes in ([1] * 44, [2] * 22, [3, 40, 1], [30, 2, 2, 1, 9], [43, 1]):
            model.reset()
            done, rows = 0, []
            for n in sizes:
                rows.append(model.forward(IDS[done : done + n], every=True))
                done += n
            assert np.array_equal(np.concatenate(rows), whole)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_token_takes_one_row(large, dtype):
    """A latent and what is turned of the keys, once, for all heads; and nothing else."""
    with Model.open(large[0], context=CONTEXT, kv_dtype=dtype) as model:
        config = model.config.layers[0].mixer
        assert isinstance(config, LatentAttentionConfig) and config.cached_dim == 576
        kind, wanted = kind_of(config), MemoryWanted(CONTEXT, dtype)
        row = {"f32": 4 * 576, "f16": 2 * 576, "q8_0": 576 // 32 * 34}[dtype]
        assert kind.memory_bytes(config, wanted) == -(-CONTEXT * row // 4096) * 4096
        assert kind.seen_bytes(config, wanted) == 2 * 2 * row * (CONTEXT // 2)  # by 8 heads
        for cache in model.text.caches:
            assert isinstance(cache, LatentCache) and cache.keys is cache.values
            assert cache.keys.nbytes == CONTEXT * row


def test_budget_changes_no_bit(large, twin, constant_rss):
    """From the least, where projections stream, to plenty, where none does."""
    path, _ = large
    with Model.open(path, context=CONTEXT) as model:
        plenty = model.logits(IDS)
    streamed = set()
    for extra in (-1.5, 0, 1, 2, 4, 40):
        with pytest.raises(BudgetError) as caught:
            Model.open(path, memory=1, context=CONTEXT)
        budget = int(caught.value.least + extra * MIB)
        with Model.open(path, memory=budget, context=CONTEXT) as model:
            streamed.add(model.plan.attention_layers)
            whole = model.logits(IDS)
            model.reset()
            single = np.stack([model.forward([token]) for token in IDS[:12]])
        assert np.array_equal(whole, plenty), model.plan
        assert np.array_equal(single, plenty[:12]), model.plan
    assert min(streamed) < 2 in streamed  # the layers whose projections stayed in DRAM


def test_threads_change_no_bit(large):
    found = []
    for threads in (1, 2, 4):
        with Model.open(large[0], context=CONTEXT, threads=threads) as model:
            found.append(model.logits(IDS))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.parametrize("name", [n for n, format in FORMATS.items() if format.block <= 64])
def test_a_product_of_each_head(name, twin):
    """Against the heads' own products, wherever the parts of the matrix end, and however many
    tokens there are."""
    random = np.random.default_rng(1)
    weights, x = (random.standard_normal(s).astype(np.float32) for s in ((35, 64), (40, 5, 64)))
    matrix = Matrix(FORMATS[name].encode(weights), 64, FORMATS[name])
    decoded = FORMATS[name].decode(matrix.data).astype(np.float64).reshape(5, 7, 64)
    exact = np.einsum("thn,hrn->thr", x.astype(np.float64), decoded)

    class Parts:
        def __init__(self, ends):
            self.ends = ends

        def parts(self):
            for first, end in zip((0, *self.ends), (*self.ends, 35), strict=True):
                yield first, Matrix(matrix.data[first:end], 64, matrix.format)

    whole = LinearOfHeads(Parts(()), rows=7)(x)
    most = 1e-4 if FORMATS[name].block == 1 else 0.4  # x is rounded to 8 bits for blocks
    assert np.abs(whole - exact).max() < most
    for ends in ((), (7,), (1, 2, 20), (3, 14, 34), tuple(range(1, 35))):
        for n in (0, 1, 2, 8, 9, 40):
            assert np.array_equal(LinearOfHeads(Parts(ends), rows=7)(x[:n]), whole[:n])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tokens_are_taken_back_anywhere(path, expected, data):
    taken_back_anywhere(path, IDS, expected, data)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_drafts_change_no_token(path, share):
    drafted(path, IDS, share)


def test_drafts_where_experts_have_no_slots(large, constant_rss):
    path, format = large
    with Model.open(path, context=CONTEXT, draft="off") as model:
        plain = list(model.generate(IDS[:8], 30, temperature=0, stop_at_eos=False))
    with pytest.raises(BudgetError) as caught:
        Model.open(path, memory=1, context=CONTEXT, draft="ngram")
    with Model.open(path, memory=caught.value.least, context=CONTEXT, draft="ngram") as model:
        assert 0 in model.plan.slots or format == "q4_0"  # whose experts are the smallest
        drafting(model, seed=1)
        drafter = Known(IDS[:8] + plain, 0.6, 1, 96)
        found = list(model.generate(IDS[:8], 30, temperature=0, stop_at_eos=False, drafter=drafter))
    assert found == plain


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_texts_that_share_passes(path, dtype):
    share_passes(path, IDS, kv_dtype=dtype)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_session_goes_on(path, dtype, tmp_path):
    """And its file holds each row once."""
    session = tmp_path / "x.session"
    with Model.open(path, context=CONTEXT, kv_dtype=dtype) as model:
        whole = model.logits(IDS)
        model.reset()
        model.forward(IDS[:15])
        model.save_session(session)
    file = SafetensorsFile(session)
    assert {n for n in file.tensors if n.startswith("layers.")} == {
        f"layers.{i}.keys" for i in range(len(model.config.layers))
    }
    file.close()
    with Model.open(path, context=CONTEXT, kv_dtype=dtype) as model:
        assert model.load_session(session).token_ids == IDS[:15]
        at = model.position
        assert np.array_equal(model.forward(IDS[at:], every=True), whole[at:])


def test_an_interrupted_copy_is_not_used(path, expected):
    """Of a text that became another's in part, nothing is taken as known."""
    with Model.open(path, context=CONTEXT, texts=2) as model:
        model.forward(IDS[:9])
        cache = model.text.caches[0]
        other = LatentCache(np.zeros_like(cache.keys), CONTEXT)

        class Broken(np.ndarray):
            def __setitem__(self, *args):
                raise KeyboardInterrupt

        other.keys = other.keys.view(Broken)
        with pytest.raises(KeyboardInterrupt):
            other.copy(cache, 9)
        assert not other.holds(9) and other.holds(0)


@pytest.mark.parametrize("dtype", ["q4_K", "q8_0"])
def test_rows_as_short_as_a_head(dtype, tmp_path):
    """What makes keys of latents has blocks where a head's rows are whole blocks, else 16 bits."""
    wide = {"moe_intermediate_size": 256, "q_lora_rank": 256, "v_head_dim": 32}
    write_hugging_face(KitModel("wide", {**LARGE, **wide}), tmp_path)
    convert(tmp_path, tmp_path / "x.flash", dtype)
    fields = json.loads((tmp_path / "config.json").read_text())
    outline(fields, tmp_path / "y.flash", dtype)
    for name in "xy":
        with Bundle(tmp_path / f"{name}.flash") as bundle:
            formats = {n: t.format.name for n, t in bundle.tensors.items() if "_b_proj" in n}
        keys = "q8_0" if dtype == "q8_0" else "f16"
        for layer in (0, 1):
            assert formats[f"layers.{layer}.k_b_proj.weight"] == keys
            assert formats[f"layers.{layer}.v_b_proj.weight"] == dtype


def test_no_layer_lies_on_flash(path):
    with Model.open(path, context=CONTEXT) as model:
        assert not any(may_lie_on_flash(layer.mixer, CONTEXT) for layer in model.config.layers)
