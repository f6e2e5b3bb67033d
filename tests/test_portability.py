"""The same bits from every compiler and vector unit, another architecture's too where it runs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parent / "_native"
FLAGS = ["-O3", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{NATIVE}"]
BUILDS = {  # compiler, flags of its own, what runs its programs
    "gcc": (["gcc", "-fopenmp"], []),
    "gcc-O1-serial": (["gcc", "-O1"], []),
    "clang": (["clang"], []),
    "aarch64": (["aarch64-linux-gnu-gcc", "-static"], ["qemu-aarch64-static"]),
}
# A change of this is a change of every logit: the order of sums, or exp, is another.
HASHES = ("2dcb447d6b55df60", "8d3146ac92528588")  # of what OPT needs, and of what others need, too


@pytest.mark.parametrize("name", BUILDS)
def test_bits(name, tmp_path):
    compiler, runner = BUILDS[name]
    missing = [tool for tool in (compiler[0], *runner) if not shutil.which(tool)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    program = tmp_path / "vector_units"
    subprocess.run(
        [compiler[0], *FLAGS, *compiler[1:], HERE / "vector_units.c", "-o", program, "-lm"],
        check=True,
    )
    found = {}
    for unit in ("", "plain", "avx2", "avx512", "avx512vnni", "neon", "neon_dotprod"):
        run = subprocess.run(
            [*runner, program], capture_output=True, text=True, check=True,
            env={**os.environ, "FLASHINFER_VECTOR_UNIT": unit},
        )  # fmt: skip
        used, *bits = run.stdout.split()
        found[used] = tuple(bits)
    assert set(found.values()) == {HASHES}, found
