import itertools

import numpy as np
import pytest

from flashinfer import Model, UserError
from flashinfer.formats.bundle.reader import Bundle, verify
from flashinfer.paper.prefetch import NoPrefetch
from flashinfer.synth import synthesize
from flashinfer.synth.neurons import find_code
from flashinfer.synth.shapes import GATED, MIXTURES, OPT, PLAIN, config_like, opt_config

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
            fires = x_of[number] @ rows[:, :256].T + ffn.neurons.biases["up"] > 0
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
        for layer in bundle.calibration.layers:
            assert layer.missed == 0 and layer.active <= layer.predicted < 0.04
            assert layer.window_rows_most[4] >= layer.window_rows[4] > 0


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
                    computes = layer.feed_forward.neurons
                    computes.activations = counted(computes.activations)
                model.logits(range(100, 160))
    assert texts[0] == texts[1] == list(range(101, 141))
    fired, used = np.sum(counts, axis=0)
    assert fired / used == pytest.approx(0.05, rel=0.15)


def test_published_shapes():
    assert OPT["opt-6.7b"] == (4096, 32, 32, 16384)
    assert all(hidden % heads == 0 and ffn == 4 * hidden for hidden, _, heads, ffn in OPT.values())


def small_mixture(**options):
    small = {
        "hidden_size": 192,
        "num_hidden_layers": 5,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "vocab_size": 1000,
        "num_experts": 32,
        "num_experts_per_tok": 4,
    }
    return {**config_like("olmoe-1b-7b", 256), **small, **options}  # fmt: skip


@pytest.mark.parametrize("repeated", [0.3, 0.4, 0.6])
def test_experts_repeat_as_asked(tmp_path, repeated):
    """And the next router, asked one layer early, is right about three times in four; both
    counted in the model's own forward."""
    path = tmp_path / "x.flash"
    synthesize(path, small_mixture(), "f16", repeated=repeated)
    verify(path)
    ids = np.arange(300, 450)
    with Model.open(path, context=200) as model:
        chosen, guessed = {}, {}
        for number, layer in enumerate(model.layers):
            router = layer.feed_forward.predictor
            router.select = noting(router.select, chosen, number)
            layer.feed_forward.prefetch = Guessing(router, guessed, number)
        for token in ids:
            model.forward([token])
    guesses = uses = same = 0
    for number, sets in chosen.items():
        same += sum(len(a & b) for a, b in itertools.pairwise(sets))
        uses += 4 * (len(sets) - 1)
        guesses += sum(len(a & b) for a, b in zip(sets, guessed.get(number, []), strict=False))
    assert same / uses == pytest.approx(repeated, rel=0.15)
    assert 0.6 < guesses / (4 * 4 * len(ids)) < 0.95


def noting(select, store, key):
    def call(x, residual):
        selection = select(x, residual)
        store.setdefault(key, []).append(set(selection.units.tolist()))
        return selection

    return call


class Guessing(NoPrefetch):
    """Notes what a router names one layer early."""

    def __init__(self, router, store, key):
        super().__init__()
        self.router, self.select, self.store, self.key = router, type(router).select, store, key

    def begin(self, ffn, x, token, residual):
        units = self.select(self.router, x, residual).units
        self.store.setdefault(self.key, []).append(set(units.tolist()))


@pytest.mark.parametrize("name", MIXTURES)
def test_shapes_of_mixtures(name, tmp_path):
    """Each can be made, in small, and its calibration is its own."""
    path = tmp_path / "x.flash"
    small = small_mixture()
    config = {key: small.get(key, value) for key, value in config_like(name, 256).items()}
    config["num_local_experts"] = config["num_experts"] = 8
    config["num_experts_per_tok"] = 2
    if "shared_expert_intermediate_size" in config:
        config["shared_expert_intermediate_size"] = 64
    synthesize(path, config, "q8_0")
    with Bundle(path) as bundle:
        assert sum(bundle.calibration.layers[1].uses) == pytest.approx(2)
    with Model.open(path) as model:
        tokens = list(model.generate([300, 301], 20, temperature=0, stop_at_eos=False))
    assert tokens == list(range(302, 322))
