"""The benches run: on a small model, for what they print and not for how fast it is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flashinfer import Model
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import convert
from flashinfer.plan.profile import boards
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import config_like

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.stem
    for path in (ROOT / "bench").glob("*.py")
    if "argparse" in path.read_text() and path.stem != "train_demo_model"
)


def bench(name, *options):
    return subprocess.run(
        [sys.executable, "-m", f"bench.{name}", *map(str, options)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_help(name):
    run = bench(name, "--help")
    assert run.returncode == 0 and "usage:" in run.stdout


SMALL = {
    "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 256, "vocab_size": 1500,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 16,
    "num_experts_per_tok": 2, "moe_intermediate_size": 256, "moe_ffn_hidden_size": 256,
    "moe_num_primary_experts": 16, "moe_num_active_primary_experts": 2, "num_local_experts": 16,
    "shared_expert_intermediate_size": 256,
}  # fmt: skip


@pytest.mark.parametrize("like", ["smallthinker-4b-a0.6b", "lfm2-8b-a1b", "qwen3-30b-a3b",
                                  "gpt-oss-20b", "qwen3.5-35b-a3b"])  # fmt: skip
def test_files_as_they_are_downloaded(like, tmp_path, monkeypatch):
    """They convert, in the number formats of their mix, and token t + 1 follows token t."""
    monkeypatch.syspath_prepend(ROOT)
    from bench.downloads import SHAPES
    from bench.gguf_models import write_gguf

    fields = {**config_like(like), **SMALL}
    kinds = fields.get("layer_types")
    if kinds:
        fields["layer_types"] = kinds[:8]
    mix, _ = SHAPES[like]
    write_gguf(tmp_path / "x.gguf", fields, mix)
    convert(tmp_path / "x.gguf", tmp_path / "x.flash")
    with Bundle(tmp_path / "x.flash") as bundle:
        formats = {t.format.name for t in bundle.tensors.values()}
    expected = {"Q4_0": {"q4_0", "q6_K"}, "Q4_K_M": {"q4_K", "q6_K"}, "MXFP4": {"q8_0"}}[mix]
    assert expected <= formats, formats
    with Model.open(tmp_path / "x.flash", context=64) as model:
        ids = np.arange(300, 340)
        assert np.array_equal(model.logits(ids).argmax(axis=1), ids + 1)


def test_every_step_of_the_ablation(synthetic, tmp_path):
    run = bench("ablation", "--model", synthetic, "--memory", "90M", "--json", tmp_path / "x.json")
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["step"] for row in rows][:2] == ["everything read", "hybrid: attention stays"]
    assert len(rows) == 8
    assert rows[0]["bytes_per_token"] > 5e6 > rows[-1]["bytes_per_token"]


def test_where_a_tokens_time_goes(synthetic):
    run = bench("profile_token", synthetic)
    assert run.returncode == 0 and "| Python |" in run.stdout, run.stderr


def test_a_mixtures_runs(tmp_path, monkeypatch):
    """One run of the bench, without its cgroups, and the optimal cache on its trace."""
    path, device = tmp_path / "x.flash", tmp_path / "device.json"
    small = {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 64,
             "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 16,
             "num_experts_per_tok": 2, "vocab_size": 1000}  # fmt: skip
    synthesize(path, {**config_like("olmoe-1b-7b", 600), **small})
    shutil.copy(boards()["laptop-nvme"], device)
    code = f"from bench.mixtures import run_ours; run_ours({str(path)!r}, '4G', {str(device)!r}, 5)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    assert figures["token_ids"] == list(range(556, 562)) and figures["slots"] == [16] * 3
    monkeypatch.syspath_prepend(ROOT)
    from bench.mixtures import optimal_share, trace_of

    traces = trace_of(path, 20)
    assert len(traces) == 3 and all(len(trace) == 40 for trace in traces)
    missed = [optimal_share(traces, [rows] * 3, 16, 20) for rows in (16, 8, 4)]
    assert 0 <= missed[0] < missed[1] < missed[2] < 1  # the first: experts not used before
