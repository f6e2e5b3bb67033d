"""The same bits from every compiler and vector unit, another architecture's too where it runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parent / "_native"
FLAGS = ["-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-strict-aliasing", f"-I{NATIVE}"]
UNITS = ("plain", "avx2", "avx512", "avx512vnni", "neon", "neon_dotprod")  # of all CPUs
BUILDS = {  # compiler, flags of its own, what runs its programs
    "gcc": (["gcc", "-fopenmp"], []),
    "gcc-O1-serial": (["gcc", "-O1"], []),
    "clang": (["clang"], []),
    "aarch64": (["aarch64-linux-gnu-gcc", "-static"], ["qemu-aarch64-static"]),
}
# A change of this is a change of every logit: the order of sums, or exp, is another.
# Of what OPT needs; with what other models need; with routers that have biases and groups; with
# keys and values in f16 and q8_0; with linear attention; of ternary weights, and of tokens that
# are rounded to 8 bits.
HASHES = (
    "7558fbec3572dbbf", "ee2a20d7078110ab", "f8486f69dce3adc1", "23a116bce662aa6b",
    "00046c90e7bb8c10", "ac0846d7b1e0bf93",
)  # fmt: skip


def environments():
    """{what is varied: an environment}: the vector unit, and what NumPy may use of the CPU."""
    found = {unit: {"FLASHINFER_VECTOR_UNIT": unit} for unit in UNITS}
    dispatched = np._core._multiarray_umath.__cpu_dispatch__
    for n in range(len(dispatched)):
        features = " ".join(dispatched[n:])
        found[f"NumPy without {features}"] = {"NPY_DISABLE_CPU_FEATURES": features}
    return found


@pytest.mark.parametrize("name, environment", environments().items(), ids=str)
def test_digests(name, environment):
    """Of the demo model, every architecture and every number format: those that are committed."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "bits.py"], capture_output=True, text=True,
        check=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert json.loads(run.stdout) == json.loads((HERE / "bits.json").read_text())


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
    for unit in ("", *UNITS):
        run = subprocess.run(
            [*runner, program], capture_output=True, text=True, check=True,
            env={**os.environ, "FLASHINFER_VECTOR_UNIT": unit},
        )  # fmt: skip
        used, *bits = run.stdout.split()
        found[used] = tuple(bits)
    assert set(found.values()) == {HASHES}, found
