"""The oracle judges our own engine as sound, and finds whatever is changed in a trace."""

import numpy as np
import pytest

from conftest import DATA
from flashinfer import Model
from flashinfer.formats.convert import convert
from flashinfer.oracle.arithmetic import KNOWN
from flashinfer.oracle.compare import compare, limit_of
from flashinfer.oracle.known import F32
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.oracle.recorded import Recorded
from flashinfer.oracle.replacement import first_difference, replace_values
from flashinfer.oracle.replay import Replay
from flashinfer.oracle.trace import trace
from flashinfer.oracle.trace_file import Trace, write_trace
from flashinfer.transformer.values import values_of

CHECKPOINTS = [p for p in sorted(DATA.iterdir()) if (p / "model.safetensors").exists()]
SOME = ["opt-plain", "llama-silu", "gemma2", "qwen2-moe-dense", "phi"]
IDS = [(i * 37 + 11) % 90 + 3 for i in range(20)]


def traced(folder, tmp_path, **options):
    """(weights, trace) of our own run of a checkpoint, in float32."""
    bundle, path = tmp_path / "x.flash", tmp_path / "t.safetensors"
    convert(folder, bundle, "f32")
    with Model.open(bundle, neurons="dense", context=len(IDS)) as model:
        trace(model, IDS, path, **options)
    return ModelWeights(folder), Trace(path)


def changed(weights, sound, path, change):
    """A trace like ``sound`` whose values went through ``change`` {name: array}."""
    values = values_of(weights.config, weights.naming)
    arrays = {name: np.array(sound.read(name)) for name in sound.names}
    change(arrays)
    order = [value for value in values if value.name in arrays]
    write_trace(path, order, arrays, "changed", weights.hf_config, IDS)
    return Trace(path)


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda p: p.name)
def test_our_own_engine_conforms(folder, tmp_path):
    weights, found = traced(folder, tmp_path)
    with weights, found:
        for replay in (True, False):
            comparison = compare(weights, found, KNOWN["float32"], replay)
            assert comparison.first is None
            assert comparison.judged > 10 * weights.config.num_hidden_layers


@pytest.mark.parametrize("keys", ["f16", "q8_0"])
@pytest.mark.parametrize("name", SOME)
def test_a_bundle_in_16_bits_conforms(name, keys, tmp_path):
    bundle, path = tmp_path / "x.flash", tmp_path / "t.safetensors"
    convert(DATA / name, bundle, "f16")
    with Model.open(bundle, neurons="dense", context=len(IDS), kv_dtype=keys) as model:
        trace(model, IDS, path)
    with ModelWeights(bundle) as weights, Trace(path) as found:
        assert found.arithmetic == f"float32-{keys}-cache"
        # Elements of keys in other blocks' steps are wrong where they are taken as float16.
        if keys == "q8_0":
            assert compare(weights, found, KNOWN["float32-f16-cache"]).first is not None
        assert compare(weights, found, KNOWN[found.arithmetic]).first is None


@pytest.mark.parametrize("name", SOME)
def test_a_summary_is_enough_for_the_run_as_a_whole(name, tmp_path):
    weights, found = traced(DATA / name, tmp_path, summary=True)
    with weights, found:
        comparison = compare(weights, found, KNOWN["float32"])
        assert comparison.first is None and not comparison.replayed
        assert comparison.judged > 10 * weights.config.num_hidden_layers


@pytest.mark.parametrize("name", SOME)
def test_every_value_is_watched(name, tmp_path):
    """One element of one value changed by a little more than the limit is found there."""
    weights, sound = traced(DATA / name, tmp_path)
    random = np.random.default_rng(7)
    with weights, sound:
        recorded = Recorded(sound, values_of(weights.config, weights.naming))
        run = Replay(weights, recorded, sound.tokens, sound.positions, KNOWN["float32"])
        for (layer, key), value in recorded.by_place.items():
            if key in ("active", "choices"):
                continue
            expected = run.compute(layer, key)
            at = tuple(random.integers(n) for n in recorded[layer, key].shape)
            spread = expected.reshape(*recorded[layer, key].shape).spread[at]
            # What is copied has no noise; float32 still rounds it.
            spread = max(spread, F32 * abs(float(recorded[layer, key][at])), 1e-30)
            step = 1.2 * limit_of(expected.value.size) * spread

            def change(arrays, value=value, at=at, step=step):
                moved = float(arrays[value.name][at]) + 2 * step
                arrays[value.name][at] = np.float32(moved)

            with changed(weights, sound, tmp_path / "c.safetensors", change) as other:
                first = compare(weights, other, KNOWN["float32"]).first
            assert first is not None and first.name == value.name
            assert (first.position, *first.index) == tuple(map(int, at))


def test_a_choice_is_judged_by_its_margin(tmp_path):
    weights, sound = traced(DATA / "mixtral", tmp_path)
    router = "model.layers.1.mlp.gate"

    def worse(arrays):
        chosen = arrays[f"{router}.choices"]
        others = np.argsort(arrays[router][4])[:1]
        chosen[4, 0] = others[0]

    with weights, sound, changed(weights, sound, tmp_path / "c.safetensors", worse) as other:
        first = compare(weights, other, KNOWN["float32"]).first
    assert first is not None and first.name == f"{router}.choices" and first.position == 4


def test_a_flip_within_the_noise_is_no_error(tmp_path):
    """Two experts whose scores differ by less than float32 tells apart may change places."""
    weights, sound = traced(DATA / "mixtral", tmp_path)
    router = "model.layers.1.mlp.gate"

    def tie(arrays, flipped):
        logits, chosen = arrays[router], arrays[f"{router}.choices"]
        best = np.argsort(-logits[4])
        logits[4, best[3]] = np.nextafter(logits[4, best[2]], -np.inf, dtype=np.float32)
        chosen[4] = np.sort([best[0], best[1], best[3 if flipped else 2]])
        del arrays[f"{router}.weights"]

    for flipped in (False, True):
        with changed(
            weights, sound, tmp_path / "c.safetensors", lambda a, f=flipped: tie(a, f)
        ) as other:
            found = compare(weights, other, KNOWN["float32"])
        choice = next(o for o in found.operations if o.name == f"{router}.choices")
        assert choice.verdict == "right"
    weights.close()
    sound.close()


def test_a_guilty_value_alone_explains_the_logits(tmp_path):
    weights, sound = traced(DATA / "llama-silu", tmp_path)
    name = "model.layers.0.mlp.down_proj"
    bundle = tmp_path / "x.flash"
    with Model.open(bundle, context=len(IDS)) as model:
        neurons = model.layers[0].feed_forward.neurons
        add = neurons.add_bias
        neurons.add_bias = lambda selection, y: (add(selection, y), np.multiply(y, 1.01, out=y))
        trace(model, IDS, tmp_path / "c.safetensors")
    with weights, sound, Trace(tmp_path / "c.safetensors") as other:
        how = KNOWN["float32"]
        assert compare(weights, other, how).first.name == name
        assert replace_values(weights, other, how, ["layers.0.mlp.down_proj"]).explains
        assert not replace_values(weights, other, how, ["layers.0.self_attn.v_proj"]).explains
        assert not replace_values(weights, sound, how, [name]).explains  # there is nothing to


def test_bits_of_two_traces(tmp_path):
    weights, sound = traced(DATA / "qwen3", tmp_path)

    def one_bit(arrays):
        arrays["model.layers.1.mlp.up_proj"].view(np.uint32)[3, 5] ^= 1

    with weights, sound:
        with changed(weights, sound, tmp_path / "a.safetensors", lambda a: None) as same:
            assert first_difference(sound, same) is None
        with changed(weights, sound, tmp_path / "b.safetensors", one_bit) as other:
            assert first_difference(sound, other) == ("model.layers.1.mlp.up_proj", 1)


def test_positions_only(tmp_path):
    """Attention needs all positions, and is not judged; the others are."""
    weights, found = traced(DATA / "llama-silu", tmp_path, positions=[0, 3, 19])
    with weights, found:
        comparison = compare(weights, found, KNOWN["float32"])
    verdicts = {o.key: o.verdict for o in comparison.operations}
    assert comparison.first is None
    assert verdicts["heads"] == "not judged" and verdicts["ffn"] == "right"
