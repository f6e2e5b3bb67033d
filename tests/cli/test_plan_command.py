"""Planning a model that is not here: the same as planning it once it is converted."""

import json
import shutil
import threading

import pytest

from conftest import DATA, ENCODER_DATA
from flashinfer.formats.convert import convert
from flashinfer.formats.number_formats import FORMATS
from flashinfer.plan.profile import boards
from flashinfer.synth.shapes import NAMES, config_like
from hub_server import serve
from make_gguf import write_gguf

FOLDERS = [*sorted(DATA.iterdir()), *sorted(ENCODER_DATA.iterdir())]
FOLDERS = [folder for folder in FOLDERS if (folder / "config.json").exists()]
ON = ("--device", "rpi5-nvme", "--memory", "300M", "--json", "-")


def figures_of(cli, *arguments):
    code, out, err = cli("plan", *arguments, *ON)
    assert code == 0, err
    return json.loads(out)


def same(found, expected):
    """Whether two plans differ by no more than the tokenizer, which a config does not have."""
    assert found["plan"]["slots"] == expected["plan"]["slots"]
    for key in ("bytes", "tokens_per_second"):
        assert found["cost"][key] == pytest.approx(expected["cost"][key], rel=0.05)


@pytest.fixture
def here(tmp_path, monkeypatch, constant_rss):
    """An empty directory, in which nothing may be left."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert not list(folder.iterdir())


@pytest.mark.parametrize("source", FOLDERS, ids=lambda folder: folder.name)
def test_by_its_config(cli, source, tmp_path, here):
    pytest.importorskip("torch") if source.name == "opt-bin" else None
    convert(source, tmp_path / "x.flash", "f32")
    expected = figures_of(cli, tmp_path / "x.flash")
    for model in (source, source / "config.json"):
        same(figures_of(cli, model, "--dtype", "f32"), expected)


def test_by_a_gguf_file(cli, tmp_path, here):
    pytest.importorskip("gguf")
    path = write_gguf(DATA / "qwen2", tmp_path / "x.gguf")
    convert(path, tmp_path / "x.flash")
    found, expected = figures_of(cli, path), figures_of(cli, tmp_path / "x.flash")
    same(found, expected)
    assert found["bytes"] == expected["bytes"] and expected["conversion"] is None
    taken = found["conversion"]
    assert taken["reads"] == path.stat().st_size and taken["writes"] == found["bytes"]
    assert not taken["assumed"] and taken["least_seconds"] > 0 == taken["encode_seconds"]
    alone = path.rename(tmp_path / "x-00001-of-00002.gguf")  # by its name one of two, and whole
    assert figures_of(cli, alone)["conversion"] == taken


def test_values_that_are_encoded_anew_take_time(cli, tmp_path, here):
    """They do where a number format is asked for, and of a checkpoint, which has floats."""
    rest = "--memory", "64G", "-c", "64", "--device", "rpi5-nvme", "--json", "-"
    taken = {
        dtype: json.loads(cli("plan", "--like", "opt-1.3b", "--dtype", dtype, *rest)[1])
        for dtype in ("f16", "mxfp4")
    }
    for found in (figures["conversion"] for figures in taken.values()):
        assert found["encode_seconds"] > 0 and not found["in_place"] and found["assumed"]
        assert found["least_seconds"] == found["flash_seconds"] + found["encode_seconds"]
    pytest.importorskip("gguf")
    path = write_gguf(DATA / "qwen2", tmp_path / "x.gguf")
    found = figures_of(cli, path, "--dtype", "f16")["conversion"]
    assert not found["in_place"]


@pytest.mark.parametrize("dtype", ["q4_K", "mxfp4", "iq4_xs"])
def test_by_a_published_shape(cli, dtype, here):
    size = 0
    for name in NAMES:
        if config_like(name)["hidden_size"] % FORMATS[dtype].block:
            continue
        code, out, err = cli("plan", "--like", name, "--dtype", dtype, "--device", "rpi5-nvme",
                             "--memory", "64G", "-c", "64", "--json", "-")  # fmt: skip
        assert code == 0, (name, err)
        found = json.loads(out)
        assert found["bytes"] > 0 and dtype in found["formats_unmeasured"]
        size = max(size, found["bytes"])
    assert size > 10e9


def test_from_a_server(cli, tmp_path, here, monkeypatch):
    """A config and a GGUF file by their addresses; of the file only the header is fetched."""
    pytest.importorskip("gguf")
    served = tmp_path / "served"
    served.mkdir()
    shutil.copy(DATA / "qwen2" / "config.json", served)
    path = write_gguf(DATA / "qwen2", served / "x.gguf")
    convert(path, tmp_path / "x.flash")
    monkeypatch.setattr("flashinfer.cli.outlines.GGUF_HEADER", path.stat().st_size // 2)
    server = serve(served, "org/name", lambda name: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{server.server_address[1]}/org/name/resolve/main"
    try:
        same(figures_of(cli, f"{at}/x.gguf"), figures_of(cli, tmp_path / "x.flash"))
        same(figures_of(cli, f"{at}/config.json"), figures_of(cli, DATA / "qwen2"))
        for wrong in (f"{at}/none.gguf", f"{at}/none.json", "http://127.0.0.1:1/x.gguf"):
            code, _, err = cli("plan", wrong, *ON)
            assert code == 1 and err.count("\n") == 1 and wrong in err
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("text", ["", "[]", "1", "{}", '{"model_type": "x"}', "[" * 9999, "\0"])
def test_what_is_no_config_is_one_line(cli, tmp_path, text, here):
    (tmp_path / "config.json").write_text(text)
    for model in (tmp_path, tmp_path / "config.json"):
        code, _, err = cli("plan", model, *ON)
        assert code == 1 and err.count("\n") == 1 and "config.json" in err


def test_what_is_missing_is_one_line(cli, tmp_path, here):
    for wrong in ((), ("x.flash", "--like", "opt-1.3b"), (tmp_path / "none",), (tmp_path,),
                  ("none.json",), ("--like", "opt-1.3b", "--dtype", "none")):  # fmt: skip
        code, _, err = cli("plan", *wrong, *ON)
        assert code in (1, 2) and "Traceback" not in err
    code, _, err = cli("plan", "--like", "opt-125m", "--dtype", "q4_K", "--device", "rpi5-nvme")
    assert code == 0, err


def test_a_table(cli, here):
    code, out, err = cli("plan", "--like", "opt-125m", "--table", "--memory", "1G")
    assert code == 0 and "rpi5-sd" in out, err
    code, out, _ = cli("plan", "--like", "opt-125m", "--table", "--memory", "1G", "--json", "-")
    rows = json.loads(out)["table"]
    speeds = [row["tokens_per_second"] for row in rows if row["device"] == "rpi5-nvme"]
    known = [speed for speed in speeds if speed is not None]
    assert code == 0 and len(speeds) == 4 and known and known == sorted(known)


def test_a_table_as_a_page(cli, tmp_path, here):
    page = tmp_path / "plan.html"
    like = ("plan", "--like", "opt-125m", "--memory", "1G", "--device", "rpi5-nvme")
    code, out, err = cli(*like, "--table", "--html", page)
    assert code == 0, err
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg viewBox") > 1 and all(board in text for board in boards())
    speed = next(line for line in out.splitlines() if line.startswith("rpi5-nvme")).split()[-1]
    assert f"{float(speed):.3g}" in text
    code, _, err = cli(*like, "--html", page)
    assert code == 1 and "--html" in err
