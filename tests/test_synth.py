import numpy as np
import pytest

from flashinfer import Model, UserError
from flashinfer.formats.bundle import Bundle, verify
from flashinfer.shapes import GATED, OPT, PLAIN, config_like, opt_config
from flashinfer.synth import find_code, synthesize

IDS = np.random.default_rng(2).integers(3, 1000, 120)


@pytest.mark.parametrize("active, fresh", [(0.03, 0.024), (0.05, 0.01), (0.1, 0.03)])
def test_neurons_fire_and_change_as_asked(tmp_path, active, fresh):
    """Counted in the model's own forward, not taken from what synthesize says."""
    path = tmp_path / "x.flash"
    config = opt_config(256, 3, 4, 2048, vocab_size=1000, positions=256)
    synthesize(path, config, "f16", active, fresh)
    verify(path)
    with Model.open(path, neurons="dense") as model:
        x_of = {}
        for number, layer in enumerate(model.layers):
            layer.ffn_norm = recording(layer.ffn_norm, x_of, number)
        model.logits(IDS)
        for number, ffn in enumerate(layer.feed_forward for layer in model.layers):
            rows = model.bundle.read(f"layers.{number}.ffn.bundles")
            fires = x_of[number] @ rows[:, :256].T + ffn.biases["up"] > 0
            recent = sum(np.roll(fires, k, axis=0) for k in range(1, 6)).astype(bool)
            assert fires.mean() == pytest.approx(active, rel=0.15)
            assert (fires & ~recent)[5:].mean() == pytest.approx(fresh, rel=0.2)


def recording(norm, store, key):
    def call(x):
        store[key] = norm(x)
        return store[key]

    return call


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_dense_and_predicted_write_the_same(tmp_path, dtype):
    path = tmp_path / "x.flash"
    synthesize(path, opt_config(128, 3, 4, 512, vocab_size=1000, positions=256), dtype)
    texts = []
    for neurons in ("dense", "predicted"):
        with Model.open(path, neurons=neurons, context=200) as model:
            texts.append(list(model.generate([5, 6], 100, temperature=0, stop_at_eos=False)))
    assert texts[0] == texts[1] and len(set(texts[0])) > 50


def test_the_same_seed_gives_the_same_file(tmp_path):
    config = opt_config(64, 2, 2, 256, vocab_size=200, positions=64)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthesize(tmp_path / name, config, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_its_calibration_is_that_of_its_model(synthetic):
    with Bundle(synthetic) as bundle:
        for layer in bundle.calibration["layers"]:
            assert layer["missed"] == 0 and layer["active"] <= layer["predicted"] < 0.04
            assert layer["window_rows_most"][4] >= layer["window_rows"][4] > 0


def test_shares_that_cannot_be_had():
    with pytest.raises(UserError, match="cannot be had"):
        find_code(0.03, 0.029, 64, np.random.default_rng(0))
    with pytest.raises(UserError, match="between 0 and"):
        find_code(0.6, 0.02, 64, np.random.default_rng(0))


SMALL = {"hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 500, "intermediate_size": 512,
         "ffn_hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 32}  # fmt: skip


@pytest.mark.parametrize("name", [*GATED, *PLAIN])
def test_other_architectures_count_up_and_fire_as_asked(name, tmp_path):
    """Published shapes, made small; neurons counted in the model's own forward."""
    path, texts, counts = tmp_path / "x.flash", [], []

    def counted(activations):
        def call(*args):
            a = activations(*args)
            counts.append((np.count_nonzero(a), a.size))
            return a

        return call

    synthesize(path, {**config_like(name, 256), **SMALL}, "f16", active=0.05, fresh=0.02)
    for neurons in ("predicted", "dense"):
        with Model.open(path, neurons=neurons, context=64) as model:
            texts.append(list(model.generate([100], 40, temperature=0, stop_at_eos=False)))
            if neurons == "dense":
                for layer in model.layers:
                    layer.feed_forward.activations = counted(layer.feed_forward.activations)
                model.logits(range(100, 160))
    assert texts[0] == texts[1] == list(range(101, 141))
    fired, used = np.sum(counts, axis=0)
    assert fired / used == pytest.approx(0.05, rel=0.15)


def test_published_shapes():
    assert OPT["opt-6.7b"] == (4096, 32, 32, 16384)
    assert all(hidden % heads == 0 and ffn == 4 * hidden for hidden, _, heads, ffn in OPT.values())
