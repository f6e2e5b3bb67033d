"""Texts from outside, too long or not UTF-8, end in one line, and within the budget."""

import os
import subprocess
import sys

import pytest

from bench.cgroup import NoCgroups, run_limited

pytest.importorskip("tokenizers")


def command(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "flashinfer", *args], capture_output=True, timeout=120, **options
    )  # fmt: skip


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text("def f(x): return x\n" * 160_000)
    return str(path)


def one_line(run, says):
    err = run.stderr.decode()
    assert run.returncode == 1 and err.count("\n") == 1 and says in err, err


def limited(memory, *args):
    try:
        return run_limited(
            [sys.executable, "-m", "flashinfer", *args, "--memory", str(memory)], memory,
            capture_output=True, timeout=300,
        )  # fmt: skip
    except NoCgroups as why:
        pytest.skip(str(why))


def test_a_prompt_that_is_too_long_is_refused_within_the_budget(long_text):
    one_line(limited(120 << 20, "run", "-f", long_text), "more tokens than the context of")
    one_line(command("run", "-f", "/dev/zero"), "/dev/zero: ")


def test_a_prompt_lives_in_its_budget():
    run = limited(120 << 20, "run", "-p", "def f(x):\n", "-n", "8", "--temp", "0")
    assert run.returncode == 0 and run.stdout.startswith(b"def f(x):")


def test_a_text_is_read_as_far_as_it_is_needed(long_text, tmp_path):
    demo = os.path.join(os.path.dirname(__file__), "../../flashinfer/data/demo.flash")
    run = limited(160 << 20, "evaluate", demo, "--text", long_text, "--tokens", "600")
    assert run.returncode == 0 and b"over 598 tokens" in run.stdout, run.stderr


def test_what_is_not_utf8_is_one_line(tmp_path):
    one_line(command("run", "-p", b"a\xffb"), "--prompt: is not UTF-8")
    (tmp_path / "x").write_bytes(b"a\xff")
    one_line(command("run", "-f", str(tmp_path / "x")), "x: is not UTF-8 text")


def test_what_cannot_be_shown_is_replaced():
    ascii = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    run = command("run", "-p", "caf\u00e9 =", "-n", "4", "--temp", "0", env=ascii)
    assert run.returncode == 0 and run.stdout.startswith(b"caf? =")


def test_control_characters_of_names_do_not_reach_a_terminal():
    run = command("run", "\x1b[31mx.flash", "--tokens", "5")
    one_line(run, "?[31mx.flash: No such file")
