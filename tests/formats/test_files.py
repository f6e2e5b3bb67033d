"""Doors to the file system: regular files only, whole files or none, no input lost."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest

from conftest import DATA
from flashinfer import UserError
from flashinfer.calibration.calibrate import calibrate
from flashinfer.formats import files
from flashinfer.formats.bundle.reader import verify
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError
from flashinfer.formats.files import (
    open_regular,
    read_text,
    refuse_loss,
    refuse_target,
    replacing,
    scratch_directory,
)

IDS = np.random.default_rng(5).integers(3, 96, 600)


@pytest.fixture(params=["nameless", "named"])
def nameless(request, monkeypatch):
    """As on a file system that has files without names, and as on one that has not."""
    if request.param == "named":
        monkeypatch.setattr(os, "O_TMPFILE", 1 << 30)
    return request.param == "nameless"


@contextmanager
def tmpfs(folder, size):
    """A file system of ``size`` bytes mounted at a new folder."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True
    )
    if made.returncode:
        pytest.skip("no mounts here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def special(kind, folder):
    """A path to something that is no regular file."""
    path = folder / "special"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(f"/dev/{kind}")
    return path


KINDS = ("fifo", "socket", "directory", "zero", "urandom", "null", "full", "tty")
DOORS = {
    "run": lambda path: ["run", path, "--tokens", "5"],
    "chat": lambda path: ["chat", path],
    "plan": lambda path: ["plan", path, "--device", "rpi5-sd"],
    "inspect": lambda path: ["inspect", path],
    "verify": lambda path: ["verify", path],
    "evaluate": lambda path: ["evaluate", path, "--text", __file__],
    "calibrate": lambda path: ["calibrate", path, "--text", __file__],
    "convert from": lambda path: ["convert", path, "x.flash"],
    "convert to": lambda path: ["convert", DATA / "opt-plain", path],
    "calibrate to": lambda path: ["calibrate", "m.flash", "--text", __file__, "-o", path],
    "profile": lambda path: ["plan", "m.flash", "--device", path],
    "profile to": lambda path: ["probe", ".", "-o", path],
    "json to": lambda path: ["inspect", "m.flash", "--json", path],
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_refused_at_every_door(cli, plain, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    shutil.copy(plain, "m.flash")
    path = special(kind, tmp_path)
    before = sorted(os.listdir())
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{door} hangs"))
    for door, command in DOORS.items():
        signal.alarm(20)
        code, out, err = cli(*command(path))
        signal.alarm(0)
        assert code == 1 and out == "" and err.count("\n") == 1, (door, out, err)
        assert "special" in err and sorted(os.listdir()) == before, (door, err)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "zero"])
def test_a_checkpoints_files_are_regular_ones(checkpoint, tmp_path, kind, name):
    folder = checkpoint("llama-silu")
    (folder / name).unlink(missing_ok=True)
    special(kind, tmp_path).rename(folder / name)
    with pytest.raises(FormatError, match=f"{name}: is (a directory|not a regular file)"):
        convert(folder, tmp_path / "x.flash", "f32")
    assert not (tmp_path / "x.flash").exists()


def test_a_file_of_many_gigabytes_is_not_read(tmp_path, checkpoint):
    path = tmp_path / "x.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match=r"x\.json: has 1,099,511,627,776 bytes"):
        read_text(path)


# ---------------------------------------------------------------------- writing


def test_mode_owner_and_links_stay(tmp_path, nameless):
    target, link = tmp_path / "there" / "x", tmp_path / "link"
    target.parent.mkdir()
    target.write_bytes(b"before")
    target.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(target, 12, 34)
    link.symlink_to("there/x")
    with replacing(link) as file:
        file.write(b"after")
    there = target.stat()
    assert link.is_symlink() and target.read_bytes() == b"after"
    assert stat.S_IMODE(there.st_mode) == 0o640
    assert os.geteuid() != 0 or (there.st_uid, there.st_gid) == (12, 34)
    assert os.listdir(target.parent) == ["x"]
    link.unlink()
    link.symlink_to("there/new")  # which is not there yet
    with replacing(link) as file:
        file.write(b"new")
    assert link.is_symlink() and link.read_bytes() == b"new"


def test_calibrating_in_place_keeps_mode_and_link(plain, tmp_path):
    target, link = tmp_path / "x.flash", tmp_path / "link.flash"
    target.write_bytes(plain.read_bytes())
    target.chmod(0o604)
    link.symlink_to(target)
    calibrate(link, IDS, tokens=600, steps=2)
    assert link.is_symlink() and stat.S_IMODE(target.stat().st_mode) == 0o604
    assert verify(target) > os.path.getsize(plain)


def test_what_is_killed_is_removed_by_the_next(tmp_path, nameless):
    """Killed while it writes, a process leaves nothing, or what the next write removes."""
    program = (
        "import os, sys, time\n"
        "from flashinfer.formats.files import replacing, scratch_directory\n"
        f"os.O_TMPFILE = {os.O_TMPFILE if nameless else 1 << 30}\n"
        "with scratch_directory('.', 'x'), replacing('x') as file:\n"
        "    file.write(bytes(100)); file.flush(); print(flush=True); time.sleep(60)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=tmp_path)
    killed.stdout.read(1)
    living = len(os.listdir(tmp_path))
    assert living == (1 if nameless else 2)
    with replacing(tmp_path / "x") as file:  # does not touch what a living process writes
        file.write(b"1")
    assert len(os.listdir(tmp_path)) == living + 1
    killed.kill()
    killed.wait()
    killed.stdout.close()
    (tmp_path / ".x.mine.part").write_bytes(b"not ours")
    with replacing(tmp_path / "x") as file:
        file.write(b"2")
    assert sorted(os.listdir(tmp_path)) == [".x.mine.part", "x"]


def test_the_moment_between_link_and_rename(tmp_path, monkeypatch):
    """An interrupt there removes the name; after a kill the next write does."""

    def interrupted(*_):
        assert len(os.listdir(tmp_path)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x") as file:
        file.write(b"1")
    assert os.listdir(tmp_path) == []


def test_a_scratch_directory_goes_whatever_happens(tmp_path):
    with pytest.raises(ZeroDivisionError), scratch_directory(tmp_path, "x") as folder:
        (folder / "a").write_bytes(b"1")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_long_names(tmp_path, nameless):
    for name in ("n" * 255, "\N{GREEK SMALL LETTER ALPHA}" * 127):
        with replacing(tmp_path / name) as file:
            file.write(b"1")
        assert (tmp_path / name).read_bytes() == b"1"
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        refuse_target(tmp_path / ("n" * 256))
    with pytest.raises(UserError, match="is not a file's name"):
        refuse_target(f"{tmp_path}/a\0b")
    assert len(os.listdir(tmp_path)) == 2


def test_full_and_read_only_targets_are_found_before_the_work(cli, plain, tmp_path, monkeypatch):
    def no_work(*_, **__):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("flashinfer.calibration.calibrate.Model.open", no_work)
    with tmpfs(tmp_path / "small", 65536) as small:
        with pytest.raises(UserError, match="the disk is full; 0 MB are needed"):
            calibrate(plain, IDS, small / "x.flash", tokens=600)
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        with pytest.raises(UserError, match=r"x\.flash: cannot be written: Read-only file system"):
            calibrate(plain, IDS, small / "x.flash", tokens=600)
    for target, says in (
        (tmp_path, "is a directory"),
        (tmp_path / "none" / "x", "cannot be written: No such file"),
        ("/proc/x.flash", "cannot be written"),
    ):
        with pytest.raises(UserError, match=says):
            calibrate(plain, IDS, target, tokens=600)


@pytest.mark.parametrize("size", [0, 4096, 16384])
def test_no_file_survives_a_full_disk(cli, plain, tmp_path, size):
    """A profile, figures and a bundle, of which the disk takes a part, or nothing."""
    with tmpfs(tmp_path / "small", 32768) as small:
        (small / "filler").write_bytes(bytes(28672 - size))
        for command in (
            ["convert", DATA / "opt-plain", small / "x.flash"],
            ["inspect", plain, "--json", small / "x.json"],
        ):
            code, _, err = cli(*command)
            done = code == 0
            assert done or (code == 1 and "x." in err and "the disk is full" in err), err
            assert set(os.listdir(small)) == {"filler", *([command[-1].name] if done else [])}
            if done:
                command[-1].unlink()


# ---------------------------------------------------------------------- nothing is lost


def ways(path, folder):
    """Paths that lead to one file: itself, by links, by another spelling."""
    (folder / "symlink").symlink_to(path)
    os.link(path, folder / "hard")
    return [path, folder / "symlink", folder / "hard", path.parent / "." / path.name]


def test_a_conversion_never_replaces_what_it_reads(cli, checkpoint, tmp_path):
    gguf = pytest.importorskip("gguf")
    from make_gguf import write_gguf

    assert gguf
    single = write_gguf(DATA / "llama-silu", tmp_path / "x.gguf")
    folder = checkpoint("llama-silu")
    (tmp_path / "links").mkdir()
    (tmp_path / "links2").mkdir()
    for source, file, links in (
        (single, single, "links"), (folder, folder / "model.safetensors", "links2"),
    ):  # fmt: skip
        before = file.read_bytes()
        for target in ways(file, tmp_path / links):
            code, _, err = cli("convert", source, target)
            assert code == 1 and "name another" in err, err
            with pytest.raises(UserError, match="is what is read"):
                convert(source, target)
            assert file.read_bytes() == before
    code, _, err = cli("convert", folder, folder / "x.flash")
    assert code == 0, err
    assert cli("convert", folder, folder / "x.flash")[0] == 0  # a bundle there may be made anew


def test_no_command_writes_over_what_it_reads(cli, plain, calibrated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "m.flash", tmp_path / "text"):
        path.write_bytes(calibrated.read_bytes())
    before = calibrated.read_bytes()
    for command in (
        ["run", "m.flash", "--tokens", "5", "--json", "m.flash"],
        ["plan", "m.flash", "--device", "text", "--json", "text"],
        ["calibrate", "m.flash", "--text", "text", "-o", "text"],
        ["calibrate", "m.flash", "--text", "text", "--json", "m.flash"],
        ["calibrate", "m.flash", "--text", "text", "-o", "new", "--json", "./new"],
        ["calibrate", "m.flash", "--text", "none", "--predictor-from", "text", "-o", "text"],
        ["verify", "m.flash", "--json", "m.flash"],
        ["convert", DATA / "opt-plain", "new", "--json", "new"],
        ["probe", "m.flash", "-o", "m.flash"],
    ):
        code, out, err = cli(*command)
        assert code == 1 and out == "" and err.count("\n") == 1, (command, err)
        assert "is what is read" in err or "is named twice" in err, (command, err)
        assert sorted(os.listdir()) == ["m.flash", "text"]
    assert all((tmp_path / name).read_bytes() == before for name in ("m.flash", "text"))
    refuse_loss("new", ["m.flash", "none", tmp_path])  # a new file is in nobody's way


@pytest.mark.parametrize("wrong", ['"2"', "-1", "[1, -1]", "1e400", "true", "[[1]]", "{}"])
def test_what_generation_config_says_is_checked_before_anything_is_written(
    checkpoint, tmp_path, wrong
):
    folder = checkpoint()
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
    with pytest.raises(FormatError, match=r"generation_config\.json: .*eos_token_id"):
        convert(folder, tmp_path / "x.flash", "f32")
    assert os.listdir(tmp_path) == ["opt-plain"]


# ---------------------------------------------------------------------- cut while it is read


@pytest.mark.parametrize("form", ["gguf", "safetensors", "bin"])
def test_a_source_that_is_cut_while_it_is_converted(checkpoint, tmp_path, form):
    """In a process of its own, which a mapping would end by SIGBUS."""
    if form == "gguf":
        pytest.importorskip("gguf")
        from make_gguf import write_gguf

        source = file = write_gguf(DATA / "llama-silu", tmp_path / "x.gguf")
    elif form == "bin":
        pytest.importorskip("torch")
        source = checkpoint("opt-bin")
        file = source / "pytorch_model.bin"
    else:
        source = checkpoint("llama-silu")
        file = source / "model.safetensors"
    program = (
        "import os, sys\n"
        "from flashinfer.formats.convert import convert\n"
        "source, file, target = sys.argv[1:]\n"
        "cut = lambda *_: os.path.getsize(file) > 4096 and os.truncate(file, 4096)\n"
        "try:\n"
        "    convert(source, target, 'f32', progress=cut)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", program, source, file, tmp_path / "x.flash"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("FormatError"), run
    assert file.name in run.stdout and "cut" in run.stdout and not (tmp_path / "x.flash").exists()


def test_opening_never_waits(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    begun = time.monotonic()
    with pytest.raises(FormatError, match="is not a regular file"):
        open_regular(tmp_path / "fifo")
    assert time.monotonic() - begun < 5


def test_without_proc_the_file_has_a_name_from_the_start(tmp_path, monkeypatch):
    """Where /proc is not mounted, a file without a name could never get one."""
    monkeypatch.setattr(files, "DESCRIPTORS", str(tmp_path / "no-proc"))
    with files.replacing(tmp_path / "x") as file:
        file.write(b"whole")
        assert len(list(tmp_path.iterdir())) == 1  # the temporary name
    assert (tmp_path / "x").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 1


def test_the_error_of_the_text_and_that_of_its_reader(tmp_path):
    """What the caller's block raises stays what it is."""
    (tmp_path / "x.txt").write_bytes(b"ab\xff")
    with (
        pytest.raises(FormatError, match=r"x\.txt: is not UTF-8"),
        files.opened_text(tmp_path / "x.txt") as file,
    ):
        file.read()
    with pytest.raises(OSError, match="of the block"), files.opened_text(tmp_path / "x.txt"):
        raise OSError("of the block")
    with pytest.raises(FormatError, match=r"none: No such file"):
        files.opened_text(tmp_path / "none")
