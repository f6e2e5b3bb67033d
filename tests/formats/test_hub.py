"""Checkpoints by their name on the Hugging Face Hub, from its cache's layout on a local disk."""

import os
import shutil
import subprocess
import sys
import threading

import pytest

from conftest import DATA
from flashinfer.formats.bundle.reader import Bundle, verify
from hub_server import serve


def convert(source, target, *options, **environment):
    return subprocess.run(
        [sys.executable, "-m", "flashinfer", "convert", source, str(target), *options],
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
    assert "pip install 'llm-in-a-flash[hub]'" in run.stderr


def test_low_disk(tmp_path):
    """From a stand-in for the Hub: the same bundle; each shard is fetched once, and deleted."""
    pytest.importorskip("huggingface_hub")
    checkpoint, here_before = DATA / "opt-sharded", {}

    def sent(name):
        here_before.setdefault(name, []).append(len(list(tmp_path.rglob("*.safetensors"))))

    server = serve(checkpoint, "facebook/opt-tiny", sent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    try:
        run = convert(
            "facebook/opt-tiny", work / "x.flash", "--low-disk",
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(home),
            HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1",
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert run.returncode == 0, run.stderr
    here = convert(str(checkpoint), tmp_path / "y.flash")
    assert here.returncode == 0, here.stderr
    with Bundle(work / "x.flash") as lean, Bundle(tmp_path / "y.flash") as whole:
        for key in ("flashinfer.checksums", "flashinfer.config"):
            assert lean.file.metadata[key] == whole.file.metadata[key]
    verify(work / "x.flash")
    assert [p.name for p in work.iterdir()] == ["x.flash"]
    shards = {path.name for path in checkpoint.glob("*.safetensors")}
    found = {name: counts for name, counts in here_before.items() if name in shards}
    assert len(shards) > 2 and found.keys() == shards  # each once, with one other at most
    assert all(len(counts) == 1 and counts[0] <= 1 for counts in found.values()), found


def test_low_disk_is_for_the_hub(tmp_path):
    run = convert(str(DATA / "opt-plain"), tmp_path / "x.flash", "--low-disk")
    assert run.returncode == 1 and "given as org/name" in run.stderr
    assert not list(tmp_path.iterdir())
