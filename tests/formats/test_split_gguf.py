"""Models in several GGUF files, and GGUF files on the Hub."""

import functools
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from conftest import DATA
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.sources import hub
from hub_server import serve

gguf = pytest.importorskip("gguf")

from make_gguf import write_gguf  # noqa: E402


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A model in several files: their paths."""
    writer = functools.partial(gguf.GGUFWriter, split_max_tensors=7)
    folder = tmp_path / "parts"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", writer)
        write_gguf(DATA / "qwen2", folder / "x.gguf")
    found = sorted(folder.iterdir())
    assert len(found) > 2
    return found


def tensors_of(path):
    with Bundle(path) as bundle:
        return {name: bundle.read(name) for name in bundle.tensors}


def test_the_same_bundle_as_from_one_file(parts, tmp_path):
    whole = write_gguf(DATA / "qwen2", tmp_path / "x.gguf")
    convert(whole, tmp_path / "one.flash")
    convert(parts[0], tmp_path / "several.flash")
    one, several = tensors_of(tmp_path / "one.flash"), tensors_of(tmp_path / "several.flash")
    assert one.keys() == several.keys()
    assert all(np.array_equal(one[name], several[name]) for name in one)


def test_parts_that_do_not_belong_together_are_one_line(parts, tmp_path, cli):
    def refused(path, match):
        with pytest.raises((FormatError, UserError), match=match) as caught:
            convert(path, tmp_path / "y.flash")
        assert "\n" not in str(caught.value) and not (tmp_path / "y.flash").exists()

    refused(parts[1], "architecture|not the first")
    renamed = tmp_path / "other.gguf"
    shutil.copy(parts[0], renamed)
    refused(renamed, "its name should end")
    original = parts[2].read_bytes()
    shutil.copy(parts[1], parts[2])
    refused(parts[0], r"split\.no is 1, not 2")
    parts[2].write_bytes(original[: len(original) // 2])
    refused(parts[0], "is it cut")
    parts[2].unlink()
    refused(parts[0], "No such file|cannot be|00003-of")
    parts[2].write_bytes(original)
    convert(parts[0], tmp_path / "y.flash")


@pytest.fixture
def repository(parts, tmp_path, monkeypatch):
    """Serves a repository with GGUF files of several kinds, one of them in several files."""
    pytest.importorskip("huggingface_hub")
    served = tmp_path / "served"
    served.mkdir()
    for path in parts:
        shutil.copy(path, served / path.name.replace("x-", "model-F32-"))
    for kind in ("Q4_K", "Q4_K_M", "q8_0"):
        write_gguf(DATA / "qwen2", served / f"model-{kind}.gguf")
    server = serve(served, "org/name", lambda name: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    yield {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("tag", ["F32", "Q4_K", "Q4_K_M", "Q8_0"])
def test_from_the_hub(repository, tmp_path, tag):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "flashinfer", *map(str, arguments)], text=True,
            capture_output=True, timeout=120, env={**os.environ, **repository},
        )  # fmt: skip

    planned = run("plan", f"org/name:{tag}", "--device", "rpi5-nvme", "--memory", "400M")
    assert planned.returncode == 0 and "tokens/s" in planned.stdout, planned.stderr
    made = run("convert", f"org/name:{tag}", tmp_path / "x.flash")
    assert made.returncode == 0, made.stderr
    write_gguf(DATA / "qwen2", tmp_path / "x.gguf")
    convert(tmp_path / "x.gguf", tmp_path / "y.flash")
    assert (tmp_path / "x.flash").stat().st_size == (tmp_path / "y.flash").stat().st_size
    wrong = run("convert", "org/name:Q3_K", tmp_path / "z.flash")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and "Q4_K" in wrong.stderr


@pytest.mark.parametrize("source", ["org/name:Q4_K_M", "a/b:c", "bartowski/X-GGUF:IQ4_XS"])
def test_names(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.names_a_gguf_file(source) and not hub.names_a_repository(source)
    assert not hub.names_a_gguf_file(source.partition(":")[0])
