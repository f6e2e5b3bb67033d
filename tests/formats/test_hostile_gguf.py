"""Damaged GGUF files of every number format: one line, or a model that runs.

python tests/formats/test_hostile_gguf.py [COUNT] [SEED]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
gguf = pytest.importorskip("gguf")


from flashinfer import Model  # noqa: E402
from flashinfer.formats.convert import convert  # noqa: E402
from flashinfer.formats.errors import UserError  # noqa: E402
from flashinfer.formats.number_formats import FORMATS  # noqa: E402
from flashinfer.oracle.kits.kit import write_kit  # noqa: E402
from make_gguf import random_qwen2, write_gguf  # noqa: E402

KINDS = [gguf.GGMLQuantizationType[name.upper()] for name, f in FORMATS.items() if f.block > 1]
SMALL = [kind for kind in KINDS if gguf.GGML_QUANT_SIZES[kind][0] == 32]
OF_KIT = (
    "gpt-oss", "olmoe", "qwen2-moe", "gemma2", "arcee", "dots1", "glm4-moe", "ernie4-5-moe",
    "ministral3", "olmo3", "deepseek-v3",
)  # fmt: skip
NUMBERS = (0, 1, 12, 20, 39, 255, 1 << 31, 1 << 40, (1 << 63) - 1)
HEADER = 6000  # bytes in which the header ends


def files(folder, random):
    """The bytes of GGUF files of a dense model and of mixtures, their formats drawn."""
    dense = random_qwen2(folder / "dense", 256, 768)
    write_kit(folder / "kit", [name.replace("-", "_") for name in OF_KIT])
    sources = [(dense, KINDS)] * 3
    sources += [(folder / "kit" / "models" / f"gguf-{name}", SMALL) for name in OF_KIT]
    for source, kinds in sources:

        def drawn(name, values, kinds=kinds):
            return None if "_inp" in name else kinds[random.integers(len(kinds))]

        yield write_gguf(source, folder / "x.gguf", drawn).read_bytes()


def damaged(raw, random):
    """The file with a few bytes changed, or cut."""
    raw = bytearray(raw)
    for _ in range(random.integers(1, 4)):
        kind = random.integers(4)
        at = int(random.integers(4, len(raw) if kind == 3 else min(len(raw), HEADER)))
        change = (
            random.bytes(1),
            random.bytes(4),
            int(random.choice(NUMBERS)).to_bytes(8, "little"),
            random.bytes(200),
        )[kind]
        raw[at : at + len(change)] = change
    return raw[: random.integers(10, len(raw))] if random.random() < 0.1 else raw


def tried(path, target):
    """Whether a file becomes a model that runs; else it is refused in one line."""
    try:
        convert(path, target)
        with Model.open(target, context=16) as model, np.errstate(all="ignore"):
            model.logits([3, 5, 7])
            model.forward([4])
    except UserError as error:
        assert "\n" not in str(error)
        return False
    return True


def survive(folder, count, seed):
    """(files that run, files that are refused) of so many."""
    random = np.random.default_rng(seed)
    whole = list(files(folder, random))
    path, found = folder / "y.gguf", [0, 0]
    for _ in range(count):
        path.write_bytes(damaged(whole[random.integers(len(whole))], random))
        found[tried(path, folder / "y.flash")] += 1
    return found[1], found[0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_damaged_files(tmp_path):
    runs, refused = survive(tmp_path, 300, 7)
    assert runs > 30 and refused > 30


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        count, seed = (int(value) for value in (*sys.argv[1:], "2000", "0")[:2])
        print(survive(Path(scratch), count, seed))
