"""The process of a command: closed and full streams, Ctrl-C at any moment."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from conftest import DATA

RUN = ["run", "--tokens", "5,17", "-n", "5", "--temp", "0", "--ignore-eos"]
EBADF, ENOSPC = "Bad file descriptor", "No space left on device"


def shell(redirection, *args, begin="", **environment):
    """A command run by a shell with this redirection: (exit code, stdout, stderr)."""
    words = sys.executable, "-m", "flashinfer", *map(str, args)
    command = " ".join(f"'{word}'" for word in words)
    run = subprocess.run(
        ["sh", "-c", f"{begin}{command} {redirection}"], capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL, env={**os.environ, **environment},
    )  # fmt: skip
    assert "Traceback" not in run.stderr and "Exception" not in run.stderr, run.stderr
    return run.returncode, run.stdout, run.stderr


@pytest.mark.parametrize("command", [RUN, ["inspect"], ["run", "--help"]])
@pytest.mark.parametrize("where, says", [(">&-", EBADF), (">/dev/full", ENOSPC)])
def test_output_that_cannot_be_written_is_one_line(plain, command, where, says):
    path = [plain] if command[-1] != "--help" else []
    code, _, err = shell(where, *command, *path)
    assert code == 1 and err.endswith(f"flashinfer: error: standard output: {says}\n"), err
    assert err.count("flashinfer: error") == 1


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", "2>&- <&-", "<&-"])
def test_diagnostics_that_nobody_reads_are_dropped(plain, where):
    """And no file that is opened takes the place of a stream that was closed."""
    expected = shell("", *RUN, plain)
    code, out, _ = shell(where, *RUN, plain)
    assert (code, out) == (0, expected[1]) == (expected[0], out) and len(out.split()) == 5
    assert shell(where, "run", "none.flash", "--tokens", "5")[0] == 1
    assert shell(where, "rum")[0] == 2


def test_a_file_that_is_written_is_no_stream(tmp_path):
    """Without streams a bundle gets the first free number, and nothing is written into it."""
    for number, where in enumerate((">&- 2>&- <&-", "2>&- <&-", "")):
        target = tmp_path / f"{number}.flash"
        code, *_ = shell(where, "convert", DATA / "opt-plain", target, "--dtype", "f32")
        assert code == 0 and shell("", "verify", target)[0] == 0
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_no_input_ends_a_chat(cli):
    pytest.importorskip("tokenizers")
    from flashinfer.cli.run import demo_model

    code, _, err = shell("<&-", "chat", demo_model())
    assert code in (0, 1) and err.count("\n") == 1  # the demo model has no template


def test_an_encoding_without_the_texts_characters():
    pytest.importorskip("tokenizers")
    code, out, err = shell(
        "", "run", "-p", "# \N{EURO SIGN}", "-n", "2", "--temp", "0", PYTHONIOENCODING="ascii"
    )
    assert code == 0 and out.startswith("# ?") and out.isascii(), err


@pytest.mark.parametrize("command", [RUN, ["inspect", "--json", "-"], ["run", "--help"]])
def test_a_reader_that_has_gone(plain, command):
    path = [plain] if command[-1] != "--help" else []
    for count in (0, 1):
        piped = f"; echo $? >&2) | head -c {count} >/dev/null"
        code, _, err = shell(piped, *command, *path, begin="(")
        assert code == 0 and "error" not in err and err.split()[-1] in ("0", "141"), err


# ---------------------------------------------------------------------- Ctrl-C


def interrupted(args, folder, delay):
    """Start a command and interrupt it: (exit code, stderr), or None where the interpreter itself,
    before any line of ours, was still on its way."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flashinfer", *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        # Also where the tests run in the background, whose SIGINT a shell has switched off.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    begun = re.search(r'__main__.py", line \d+, in main|flashinfer: ', err)
    if not begun and process.returncode in (1, -signal.SIGINT):
        return None
    return process.returncode, err


LONG = {
    "run": (1.0, ["run", "{model}", "--tokens", "5", "-n", "250", "--neurons", "dense"]),
    "synth": (1.5, ["synth", "x.flash", "--hidden-size", "256", "--layers", "8"]),
    "convert": (0.7, ["convert", DATA / "opt-plain", "x.flash"]),
    "verify": (0.5, ["verify", "{model}"]),
    "plan": (0.6, ["plan", "{model}", "--device", "rpi5-sd"]),
    "probe": (4.0, ["probe", ".", "-o", "x.json"]),
}


@pytest.mark.parametrize("most, command", LONG.values(), ids=LONG)
def test_ctrl_c_at_any_moment(synthetic, tmp_path, most, command):
    """130 without a traceback, or the whole result; nothing half done is left."""
    seeded, found = random.Random(most), []
    command = [str(word).format(model=synthetic) for word in command]
    for _ in range(4):
        answer = interrupted(command, tmp_path, seeded.uniform(0.05, most))
        if answer is None:
            continue
        code, err = answer
        found.append(code)
        assert code in (0, 130) and "Traceback" not in err and "Exception" not in err, err
        assert code == 0 or err.endswith("flashinfer: interrupted\n") or "tokens/s" in err, err
        left = os.listdir(tmp_path)
        assert left in ([], ["x.flash"], ["x.json"]) and (not left or 0 in found)
    assert found


def test_ctrl_c_within_exec(tmp_path):
    """Where Python notes for its own exit that an interrupt was not handled."""
    (tmp_path / "command.py").write_text(
        "from flashinfer import __main__\n"
        "from flashinfer.cli import main\n"
        "interrupt = 'import signal; signal.raise_signal(signal.SIGINT)'\n"
        "main._run = lambda argv: exec(interrupt)\n"
        "__main__.main()\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "command"], cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert run.returncode == 130 and run.stderr == "\nflashinfer: interrupted\n"


def test_ctrl_c_while_importing(tmp_path):
    """The first 200 ms, in which NumPy and its like are imported."""
    command = ["run", "--tokens", "5", "-n", "400"]
    answers = [interrupted(command, tmp_path, 0.03 + step / 50) for step in range(9)]
    codes = [answer[0] for answer in answers if answer]
    errors = [answer[1] for answer in answers if answer]
    assert codes and set(codes) == {130}, codes
    assert not any("Traceback" in err or "Exception" in err for err in errors), errors
