"""The commands as a user meets them: output, one-line errors, exit codes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import DATA
from flashinfer import Model

TOKENS = ["--tokens", "5,17,60", "--temp", "0", "--ignore-eos"]


def command(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "flashinfer", *map(str, args)],
        capture_output=True, text=True, **options,
    )  # fmt: skip


def test_from_checkpoint_to_tokens(cli, tmp_path):
    path = tmp_path / "x.flash"
    assert cli("convert", DATA / "opt-plain", path, "--dtype", "f32")[0] == 0
    assert cli("verify", path)[0] == 0
    code, out, _ = cli("run", path, *TOKENS, "-n", 10)
    assert code == 0
    with Model.open(path) as model:
        expected = list(model.generate([5, 17, 60], 10, temperature=0, stop_at_eos=False))
    assert [int(word) for word in out.split()] == expected


def test_json_has_the_figures(cli, calibrated, tmp_path):
    file = tmp_path / "figures.json"
    code, out, err = cli("run", calibrated, *TOKENS, "-n", 12, "--window", 4, "--memory", "2G",
                         "--json", file)  # fmt: skip
    figures = json.loads(file.read_text())
    assert code == 0 and figures["token_ids"] == [int(word) for word in out.split()]
    assert figures["prompt_tokens"] == 3 and figures["generated_tokens"] == 12
    assert figures["memory_budget_bytes"] == 2 << 30 and figures["window"] == 4
    assert 0 < figures["peak_rss_bytes"] < 2 << 30 and 0 <= figures["cache_hit_rate"] <= 1
    for key in ("prompt_tokens_per_second", "tokens_per_second", "flash_bytes_per_token"):
        assert figures[key] >= 0
    assert "tokens/s" in err and "read per token" in err


def test_a_seed_repeats(cli, calibrated):
    texts = [
        cli("run", calibrated, "--tokens", "5", "-n", 20, "-s", seed, "--ignore-eos")[1]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_end_of_the_context_is_said(cli, calibrated):
    code, out, err = cli("run", calibrated, *TOKENS, "-n", 100)
    assert code == 0 and len(out.split()) == 48 - 3 + 1 and "context of 48 tokens is full" in err


def test_inspect_and_verify_tell_the_same_as_json(cli, calibrated):
    code, out, _ = cli("inspect", calibrated, "--memory", "4G")
    assert code == 0 and "2 layers, hidden size 40, 72 neurons" in out and "rank" in out
    figures = json.loads(cli("inspect", calibrated, "--memory", "4G", "--json", "-")[1])
    assert (
        figures["plan"]["budget"] == 4 << 30
        and figures["config"]["layers"][0]["ffn"]["d_ffn"] == 72
    )
    assert json.loads(cli("verify", calibrated, "--json", "-")[1])["sound"]


@pytest.mark.parametrize("name", ["run", "plan", "inspect"])
def test_what_run_refuses_plan_and_inspect_refuse(cli, plain, name):
    tokens = ["--tokens", "5"] if name == "run" else []
    for options, says in (
        (["--neurons", "predicted"], "has no predictors"),
        (["-c", 9999], "context 9999 is not within"),
        (["--device", "rpi6"], "'rpi6' is no file"),
    ):
        code, out, err = cli(name, plain, *tokens, *options)
        assert code == 1 and says in err and err.count("\n") == 1 and out == ""


def test_calibrate_and_synth(cli, tmp_path):
    path = tmp_path / "x.flash"
    code, _, err = cli("synth", path, "--hidden-size", 64, "--layers", 2, "--vocab-size", 300,
                       "--context", 64)  # fmt: skip
    assert code == 0 and "% of the neurons fire" in err
    code, _, err = cli("calibrate", path, "--text", __file__)
    assert code == 1 and "has no tokenizer" in err


def test_module_and_version():
    run = command("--version")
    assert run.returncode == 0 and run.stdout.startswith("flashinfer ")


WRONG = {
    "no such model": (["run", "none.flash", "--tokens", "5"], 1, "none.flash: No such file"),
    "not a bundle": (["run", __file__, "--tokens", "5"], 1, "not a safetensors file"),
    "a directory": (["run", DATA / "opt-plain", "--tokens", "5"], 1, "flashinfer convert"),
    "a checkpoint's file": (
        ["run", DATA / "opt-plain" / "model.safetensors", "--tokens", "5"],
        1,
        "no flashinfer bundle",
    ),
    "verify no such": (["verify", "none.flash"], 1, "none.flash: No such file"),
    "convert no such": (["convert", "none", "x.flash"], 1, "none: does not exist"),
    "to nowhere": (["convert", DATA / "opt-plain", "none/x.flash"], 1, "none/x.flash"),
    "no command": ([], 2, "COMMAND"),
    "unknown command": (["rum"], 2, "rum"),
    "unknown flag": (["run", "--windw", "5"], 2, "--windw"),
    "two prompts": (["run", "-p", "a", "--tokens", "1"], 2, "not allowed with"),
    "bad size": (["run", "--memory", "lots"], 2, "not a size such as 600M"),
    **{
        f"{flag} {value[:9]}": (["run", "--tokens", "5", flag, value], 2, flag)
        for flag, values in {
            "--temp": ("-1", "nan", "inf", "1_0", "9" * 400),
            "--top-p": ("nan", "0", "1e400"),
            "--top-k": ("-1", "9" * 400, "1.5", str(1 << 64)),
            "--seed": ("-1", "9" * 5000, "1_0"),
            "--window": ("9" * 400, str(1 << 63), "\u0663"),
            "-c": ("9" * 400, str(1 << 31)),
            "-n": ("9" * 5000, "-5"),
            "-t": (str(1 << 64), "1e3"),
            "--memory": ("1e400", "9" * 400 + "G", "0.0000001K", "\u0663G", str(1 << 63), "nan"),
        }.items()
        for value in values
    },
    "ids of 5000 digits": (["run", "--tokens", "5," + "9" * 5000], 2, "token ids such as"),
    "calibrate -1 steps": (["calibrate", "x", "--text", "x", "--steps", "-1"], 2, "from 0 on"),
    "synth of seed -1": (["synth", "x", "--seed", "-1"], 2, "argument -s/--seed"),
    "bad ids": (["run", "--tokens", "a,b"], 2, "token ids such as 2,10,15"),
    "bad window": (["run", "--window", "0"], 2, "whole number from 1 on"),
    "bad dtype": (["convert", "a", "b", "--dtype", "f8"], 2, "f32"),
    "synth of nothing": (["synth", "x.flash"], 1, "--like"),
    "prompt file": (["run", "-f", "none.txt"], 1, "none.txt: No such file"),
}


@pytest.mark.parametrize("args, code, says", WRONG.values(), ids=WRONG)
def test_mistakes_are_one_line(cli, tmp_path, monkeypatch, args, code, says):
    monkeypatch.chdir(tmp_path)
    found, out, err = cli(*args)
    assert found == code and says in err and out == ""
    if code == 1:
        assert err.startswith("flashinfer: error: ") and err.count("\n") == 1
    assert "Traceback" not in err and os.listdir(tmp_path) == []


def test_mistakes_with_a_model(cli, calibrated, plain):
    for args, says in (
        ([calibrated, "--tokens", "96"], "token id 96 is not within 0 to 95"),
        ([calibrated, "--tokens", ",".join(["5"] * 49)], "context"),
        ([calibrated, "--tokens", "5", "-c", "60"], "1 to 48"),
        ([calibrated, "--tokens", "5", "--memory", "20M"], "the least for a context"),
        ([calibrated, "-p", "text"], "has no tokenizer"),
        ([plain, "--tokens", "5", "--neurons", "predicted"], "flashinfer calibrate"),
        ([plain, "--tokens", "5", "--json", "/none/x.json"], "/none/x.json: cannot be written"),
    ):
        code, _, err = cli("run", *args)
        assert code == 1 and says in err and "Traceback" not in err, err


def test_a_directory_that_is_not_writable(cli, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.geteuid() == 0:
        folder = Path("/proc")  # root may write to any other
    code, _, err = cli("convert", DATA / "opt-plain", folder / "x.flash")
    assert code == 1 and f"{folder / 'x.flash'}: cannot be written" in err
    assert err.count("\n") == 1


def test_ctrl_c_is_130_without_a_traceback(synthetic):
    process = subprocess.Popen(
        [sys.executable, "-m", "flashinfer", "run", str(synthetic), "--tokens", "5", "-n", "250",
         "--neurons", "dense", "--memory", "80M", "--ignore-eos"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "FLASHINFER_KERNELS": "numpy"},  # slowly
        # Also where the tests run in the background, whose SIGINT a shell has switched off.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.read(20)  # some tokens are there, and most are still to come
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted" in err
    assert "tokens/s" in err  # the account of what was done


def test_a_closed_pipe_is_quiet(synthetic):
    process = subprocess.Popen(
        [sys.executable, "-m", "flashinfer", "run", str(synthetic), "--tokens", "5", "-n", "200",
         "--ignore-eos"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141 and "Traceback" not in err and "Exception" not in err


def test_numpy_kernels_write_the_same_tokens(synthetic):
    texts = [
        command("run", synthetic, *TOKENS, "-n", 12, env={**os.environ, **kernels}).stdout
        for kernels in ({}, {"FLASHINFER_KERNELS": "numpy"})
    ]
    assert texts[0] == texts[1] and len(np.fromstring(texts[0], sep=" ", dtype=int)) == 12


def test_the_demo_model_writes(cli):
    pytest.importorskip("tokenizers")
    code, out, err = cli("run", "-p", "import os\n\n\ndef ", "-n", 24, "--temp", "0")
    assert code == 0 and out.startswith("import os\n\n\ndef ") and len(out) > 40
    assert "generation  24 tokens" in err
