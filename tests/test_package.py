"""What importing the package brings along."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_core_needs_numpy_and_tqdm_only():
    """Opening and running a model by token ids imports none of the extras."""
    code = (
        "import sys; import flashinfer.cli.main;"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'safetensors', 'pytest')"
        " if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_distribution_has_every_package():
    """setuptools takes those that pyproject.toml lists, and no others."""
    root = Path(__file__).parents[1]
    if not (root / "pyproject.toml").exists():
        pytest.skip("the tests lie apart from the source")
    text = (root / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    found = {"flashinfer"}
    for folder, name in (("flashinfer", "flashinfer"), ("formats", "flashinfer.formats"),
                         ("_native", "flashinfer._native")):  # fmt: skip
        for path in (root / folder).rglob("*.py"):
            inner = path.parent.relative_to(root / folder).parts
            found.add(".".join((name, *inner)))
    assert found == set(re.findall(r'"(.*?)"', listed[1])) - {"flashinfer.plan.boards",
                                                             "flashinfer.data"}  # fmt: skip
