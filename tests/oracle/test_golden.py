"""A golden judges other engines without the model."""

import numpy as np
import pytest

from conftest import DATA
from flashinfer import FormatError, Model
from flashinfer.formats.convert import convert
from flashinfer.oracle.arithmetic import KNOWN
from flashinfer.oracle.golden import compare_with_golden, write_golden
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.oracle.summary import sampled
from flashinfer.oracle.trace import trace
from flashinfer.oracle.trace_file import Trace, write_trace
from flashinfer.transformer.values import values_of

IDS = [(i * 37 + 11) % 90 + 3 for i in range(12)]


@pytest.mark.parametrize("name", ["opt-plain", "llama-silu", "gemma2", "qwen2-moe", "phi"])
def test_our_engine_conforms_and_a_change_is_found(name, tmp_path):
    golden, path = tmp_path / "golden.safetensors", tmp_path / "t.safetensors"
    convert(DATA / name, tmp_path / "x.flash", "f32")
    with Model.open(tmp_path / "x.flash", neurons="dense", context=len(IDS)) as model:
        arrays = trace(model, IDS)
        trace(model, IDS, tmp_path / "s.safetensors", summary=True)
    with ModelWeights(DATA / name) as weights:
        write_golden(weights, IDS, KNOWN["float32"], golden)
        order = [v for v in values_of(weights.config, weights.naming) if v.name in arrays]
        write_trace(path, order, arrays, "ours", weights.hf_config, IDS)
        victim = next(v for v in order if v.layer == 1 and v.key == "o")
        at = sampled(victim.name, arrays[victim.name].size)[3]
        arrays[victim.name].reshape(-1)[at] += 1e-2
        write_trace(tmp_path / "w.safetensors", order, arrays, "wrong", weights.hf_config, IDS)
    with Trace(golden) as reference:
        assert golden.stat().st_size < 60_000
        for sound in (path, tmp_path / "s.safetensors"):
            with Trace(sound) as other:
                found = compare_with_golden(reference, other)
            assert found.first is None and found.judged > 20
        with Trace(tmp_path / "w.safetensors") as other:
            assert compare_with_golden(reference, other).first.name == victim.name


def test_the_commands(cli, tmp_path):
    golden, path = tmp_path / "golden.safetensors", tmp_path / "t.safetensors"
    convert(DATA / "llama-silu", tmp_path / "x.flash", "f32")
    ids = ",".join(map(str, IDS))
    model = tmp_path / "x.flash"
    assert cli("trace", model, "--tokens", ids, "--golden", "float32", "-o", golden)[0] == 0
    assert cli("trace", model, "--tokens", ids, "-o", path)[0] == 0
    code, out, _ = cli("compare", golden, path, "--html", tmp_path / "c.html")
    assert code == 0 and "conforms" in out
    code, _, err = cli("compare", golden, path, "--arithmetic", "llama.cpp")
    assert code == 1 and "need a model" in err
    code, _, err = cli("trace", model, "--tokens", ids, "--golden", "float33", "-o", golden)
    assert code == 1 and "float33" in err
    code, _, err = cli("trace", model, "--tokens", "9999", "--golden", "float32", "-o", golden)
    assert code == 1 and "vocabulary" in err


def test_other_tokens_and_other_sizes(tmp_path):
    golden = tmp_path / "golden.safetensors"
    with ModelWeights(DATA / "llama-silu") as weights:
        write_golden(weights, IDS, KNOWN["float32"], golden)
        logits = next(v for v in values_of(weights.config, weights.naming) if v.key == "logits")
        few = {"logits": np.zeros((3, 96), dtype=np.float32)}
        write_trace(tmp_path / "a.safetensors", [logits], few, "x", weights.hf_config, IDS[:3])
        small = {"logits": np.zeros((len(IDS), 95), dtype=np.float32)}
        write_trace(tmp_path / "b.safetensors", [logits._replace(shape=(95,))], small, "x", {}, IDS)
    with Trace(golden) as reference:
        for name, what in (("a", "not a trace of all tokens"), ("b", "numbers")):
            with (
                Trace(tmp_path / f"{name}.safetensors") as other,
                pytest.raises(FormatError, match=what),
            ):
                compare_with_golden(reference, other)
