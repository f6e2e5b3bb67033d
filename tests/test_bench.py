"""The benches run: on a small model, for what they print and not for how fast it is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
