"""The benches run: on a small model, for what they print and not for how fast it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
