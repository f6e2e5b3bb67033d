"""Every command that takes --memory, in a memory cgroup of exactly that: it is never killed.

Texts, lines and threads are far more than the budget holds; the budget is the least that the
command itself names, and then some more.
"""

import re
import sys

import pytest
from ternary_checkpoints import make
from test_chat import checkpoint
from test_encoders import speaking_encoder

from bench.cgroup import NoCgroups, run_limited
from flashinfer.cli.run import demo_model
from flashinfer.formats.convert import convert
from flashinfer.oracle.kits.configs import GGUF_MODELS
from flashinfer.oracle.kits.gguf_form import gguf_of

pytest.importorskip("tokenizers")
DEMO = str(demo_model())
AND_STEPS = ["-o", "OUT", "--steps", "5"]
LONG = ["--text", "LONG", "--tokens", "600"]
LAYOUT, TOKENS = "--layout=coactivation", ",".join(str(3 + i) for i in range(50))
COMMANDS = {
    "run": ["run", DEMO, "-p", "def f(x):\n", "-n", "8"],
    "run, a long text": ["run", DEMO, "-f", "LONG", "-n", "8"],
    "run, many threads": ["run", DEMO, "-p", "import os", "-n", "8", "-t", "1024"],
    "run, all neurons": ["run", DEMO, "-p", "import os", "-n", "8", "--neurons", "dense"],
    "run, keys of 8 bits": ["run", DEMO, "-p", "import", "-n", "8", "--kv-dtype", "q8_0"],
    "run, a session": ["run", DEMO, "-f", "SHORT", "-n", "8", "--session", "SESSION"],
    "run, a GGUF file": ["run", "GGUF", "--tokens", "5,6,7", "-n", "8"],
    "run, a ternary model": ["run", "TERNARY", "--tokens", TOKENS, "-n", "8"],
    "chat, a session": ["chat", "CHAT", "-n", "20", "--session", "CHATTED"],
    "chat": ["chat", "CHAT", "-n", "20"],
    "encode": ["encode", "ENCODER", "-p", "ab c", "jj"],
    "evaluate": ["evaluate", DEMO, *LONG],
    "calibrate": ["calibrate", DEMO, *LONG, *AND_STEPS],
    "calibrate, many tokens": [
        "calibrate",
        DEMO,
        "--text",
        "LONG",
        "--tokens",
        "20000",
        *AND_STEPS,
    ],
    "calibrate, a layout": ["calibrate", DEMO, *LONG, *AND_STEPS, LAYOUT],
    "plan": ["plan", DEMO, "--device", "rpi5-sd"],
    "inspect": ["inspect", DEMO],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets")
    (folder / "long.txt").write_text("def f(x): return x\n" * 160_000)
    (folder / "short.txt").write_text("def f(x): return x\n" * 40)
    convert(checkpoint(folder / "hf", context=2000), folder / "chat.flash")
    model = next(model for model in GGUF_MODELS if model.name == "gguf-olmoe")
    (folder / "x.gguf").write_bytes(gguf_of(model, "q4_0"))
    ternary, _ = make(folder / "ternary", "packed", neurons=32_768)  # its rows wait: 2 MB
    convert(ternary, folder / "ternary.flash")
    (folder / "lines").write_text("Hello\n" + "x" * 1_000_000 + "\nBye\n" + "y " * 5000 + "\n")
    return {"LONG": str(folder / "long.txt"), "CHAT": str(folder / "chat.flash"),
            "ENCODER": str(speaking_encoder(folder)), "GGUF": str(folder / "x.gguf"),
            "SHORT": str(folder / "short.txt"), "SESSION": str(folder / "x.session"),
            "TERNARY": str(folder / "ternary.flash"), "CHATTED": str(folder / "y.session"),
            "OUT": str(folder / "out.flash"), "lines": folder / "lines"}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_outgrows_its_budget(name, files):
    command = [sys.executable, "-m", "flashinfer", *(files.get(a, a) for a in COMMANDS[name])]

    def limited(mib):
        with open(files["lines"], "rb") as stdin:
            return run_limited([*command, "--memory", f"{mib}M"], mib << 20, stdin=stdin,
                               capture_output=True, timeout=300)  # fmt: skip

    try:
        budget, succeeded = 100, []
        for _ in range(6):
            run = limited(budget)
            said = run.stderr.decode()
            assert run.returncode in (0, 1), (budget, run.returncode, said)
            assert "Traceback" not in said and said.count("error:") <= 1, said
            succeeded.append(run.returncode == 0)
            least = re.search(r"is too small; the least .* is (\d+)M", said)
            budget = int(least[1]) if least else budget + 24
    except NoCgroups as why:
        pytest.skip(str(why))
    assert any(succeeded) or name == "run, a long text", said
