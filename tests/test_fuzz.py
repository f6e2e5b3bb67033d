"""Some hostile files of each kind; ``python tests/fuzz_files.py`` makes as many as one likes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "kind, count", [("bundle", 100), ("companion", 150), ("gguf", 150), ("profile", 100)]
)
def test_hostile_files_are_used_or_refused_in_one_line(kind, count):
    if kind in ("gguf", "companion"):
        pytest.importorskip("gguf")
    program = Path(__file__).with_name("fuzz_files.py")
    run = subprocess.run(
        [sys.executable, program, "--kind", kind, "--count", str(count)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    cases, usable, peak = map(int, re.findall(r"\d+", run.stdout))
    assert cases == count and 0 < usable < count and peak < 400
