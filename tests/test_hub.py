"""Checkpoints by their name on the Hugging Face Hub, from its cache's layout on a local disk."""

import os
import shutil
import subprocess
import sys

import pytest

from conftest import DATA


def convert(source, target, **environment):
    return subprocess.run(
        [sys.executable, "-m", "flashinfer", "convert", source, str(target)],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["opt-plain", "opt-bin"])
def test_from_the_cache(name, tmp_path):
    pytest.importorskip("huggingface_hub")
    if name == "opt-bin":
        pytest.importorskip("torch")
    repository = tmp_path / "models--facebook--opt-tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(DATA / name, repository / "snapshots" / commit)
    run = convert(
        "facebook/opt-tiny", tmp_path / "x.flash", HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1"
    )
    assert run.returncode == 0, run.stderr
    here = convert(str(DATA / name), tmp_path / "y.flash")
    assert here.returncode == 0
    assert (tmp_path / "x.flash").stat().st_size == (tmp_path / "y.flash").stat().st_size


def test_offline_is_one_line(tmp_path):
    pytest.importorskip("huggingface_hub")
    run = convert(
        "facebook/none", tmp_path / "x.flash", HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1"
    )
    assert run.returncode == 1 and run.stderr.startswith("flashinfer: error: facebook/none: cannot")
    assert run.stderr.count("\n") == 1


def test_without_the_library_is_one_line(tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError")
    run = convert("facebook/none", tmp_path / "x.flash", PYTHONPATH=str(tmp_path))
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert "pip install 'flashinfer[hub]'" in run.stderr
