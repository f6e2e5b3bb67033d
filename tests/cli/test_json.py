"""What ``--json`` writes: every command's object has the schema and the keys of docs/json.md."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from conftest import DATA, ENCODER_DATA
from flashinfer import Model, kernels
from flashinfer.cli.common import JSON_SCHEMA
from flashinfer.cli.main import COMMANDS
from flashinfer.cli.run import demo_model
from flashinfer.formats.convert import convert
from flashinfer.oracle.trace import trace

PAGE = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
SPEAKS_ONLY = {"chat"}  # commands whose output is for people alone
# Options with which a command writes an object of its own.
OF_THEIR_OWN = ("evaluate --modes", "evaluate --against", "evaluate --choices")


def arguments(name, folder, plain):
    """A command line that ends well, and quickly."""
    out, text, encoder = folder / "x.flash", folder / "text.py", folder / "encoder.flash"
    convert(ENCODER_DATA / "bert", encoder, "f32")
    text.write_text("def double(x):\n    return 2 * x\n" * 60)
    answer = folder / "answer.py"
    answer.write_text("import numpy as np\n\n\ndef bundle(up, down):\n"
                      "    return np.hstack([up, down.T])\n")  # fmt: skip
    logits, questions = folder / "x.npy", folder / "x.jsonl"
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"tokens": [5, 17], "max_tokens": 3}\n' * 12)
    np.save(logits, np.zeros((64, 4096), dtype=np.float32))
    questions.write_text(json.dumps({"ctx": "import", "endings": ["os", "):"], "label": 0}))
    with Model.open(plain, neurons="dense") as model:
        trace(model, [5, 17], folder / "y.safetensors")
    return {
        "run": [plain, "--tokens", "5,17", "-n", 3],
        "convert": [DATA / "opt-plain", out],
        "calibrate": [demo_model(), "--text", text, "--tokens", 512, "--steps", 1, "-o", out],
        "evaluate": [demo_model(), "--text", text, "--tokens", 64],
        "evaluate --modes": [demo_model(), "--text", text, "--tokens", 64],
        "evaluate --against": [logits, demo_model(), "--text", text, "--tokens", 64],
        "evaluate --choices": [questions, demo_model()],
        "batch": [plain, prompts, "-o", folder / "texts.jsonl"],
        "encode": [encoder, "--tokens", "5,17"],
        "surrogate": [plain, "--prompts", prompts, "-o", folder / "x.store"],
        "trace": [plain, "--tokens", "5,17", "-o", folder / "x.safetensors"],
        "compare": [plain, folder / "y.safetensors"],
        "digest": [plain, "--tokens", "5,17"],
        "plan": [plain, "--device", "rpi5-nvme"],
        "probe": [folder, "-o", folder / "profile.json", "-t", 1],
        "report": [folder, "--like", "opt-125m"],
        "inspect": [plain],
        "verify": [plain],
        "kit": [folder / "kit", "--arch", "opt"],
        "study": ["bundling", demo_model(), "--device", "rpi5-nvme"],
        "watch": [
            demo_model(),
            "-p",
            "x",
            "-n",
            3,
            "-o",
            folder / "watch.html",
            "--device",
            "rpi5-nvme",
        ],
        "check": [1, answer],
        "synth": [out, "--hidden-size", 64, "--layers", 2, "--vocab-size", 300, "--context", 64],
    }[name]


def documented(name):
    """{key: its meaning} of a command's section."""
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)[1]
    rows = re.findall(r"^\| (`.*?`) \| (.*) \|$", section, re.M)
    return {key: meaning for keys, meaning in rows for key in re.findall(r"`(\w+)`", keys)}


@pytest.mark.parametrize("name", [n for n in (*COMMANDS, *OF_THEIR_OWN) if n not in SPEAKS_ONLY])
def test_the_object_has_the_schema_and_the_keys_of_its_page(
    cli, plain, tmp_path, quick_probe, name
):
    if name.startswith(("calibrate", "evaluate")):
        pytest.importorskip("tokenizers")
    if name == "kit" and kernels.in_use != "native":
        pytest.skip("kits are written with the compiled kernels")
    file = tmp_path / "figures.json"
    code, _, err = cli(*name.split(), *arguments(name, tmp_path, plain), "--json", file)
    assert code == 0, err
    figures, keys = json.loads(file.read_text()), documented(name)
    assert next(iter(figures.items())) == ("schema", JSON_SCHEMA)
    assert set(figures) <= set(keys)
    assert {key for key in keys if not keys[key].startswith("Only ")} <= set(figures)


def test_the_page_says_which_schema_is_written():
    assert f'"schema": {JSON_SCHEMA}' in PAGE


def test_only_a_conversation_has_no_figures(cli):
    without = {name for name in COMMANDS if "--json" not in cli(name, "--help")[1]}
    assert without == SPEAKS_ONLY
