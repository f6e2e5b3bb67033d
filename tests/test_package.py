"""The structure: imports only go down, and formats knows nothing of the engine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("cli",),
    ("probe", "chat", "evaluate"),
    ("calibrate", "synth"),
    ("calibrate_routing", "text_states"),
    ("shapes",),
    ("model",),
    ("planning", "layers"),
    ("stats", "measuring", "loading"),
    ("tokenizer",),
    ("worker",),
    ("memory", "cost", "profile", "feedforward", "shared_expert", "predictor_import"),
    ("predictor_training",),
    ("traces", "timeline", "row_shares", "threads"),
    ("attention", "predictor", "weights", "positions", "sampling"),
    ("neuron_cache", "neurons", "flash"),
    ("kernels", "fixed_math"),
    ("_native",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports(path):
    """The modules of flashinfer that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashinfer"):
            if node.module in ("flashinfer", "flashinfer._native"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("flashinfer"))


def modules():
    return [p for p in (ROOT / "flashinfer").rglob("*.py") if not p.name.startswith("__")]


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_imports_only_go_down(path):
    place = path.relative_to(ROOT / "flashinfer").parts[0].removesuffix(".py")
    for name in imports(path):
        parts = name.split(".")
        if len(parts) == 1 or parts[1] in ("formats", "__version__"):
            continue
        assert parts[1] != "_native" or place == "kernels", "kernels alone imports _native"
        same = parts[1] == place and place in ("cli", "kernels", "synth")
        assert same or FLOOR[parts[1]] > FLOOR[place], f"{place} imports {name}"


def test_formats_imports_none_of_the_engine():
    for path in (ROOT / "formats").rglob("*.py"):
        for name in imports(path):
            assert name.startswith("flashinfer.formats"), f"{path.name} imports {name}"


def test_the_core_needs_numpy_and_tqdm_only():
    """Opening and running a model by token ids imports none of the extras."""
    code = (
        "import sys; import flashinfer.cli.main;"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'safetensors', 'pytest')"
        " if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
