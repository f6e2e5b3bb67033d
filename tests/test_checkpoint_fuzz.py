"""Damaged and hostile checkpoints: one line, or a bundle that runs.

python tests/test_checkpoint_fuzz.py [--count 5000] [--seed 0]
"""

import argparse
import copy
import json
import math
import os
import resource
import shutil
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from ternary_checkpoints import FORMS, make

from flashinfer import Model
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import UserError
from flashinfer.formats.sources import gguf_checkpoint

DATA = Path(__file__).parent / "data"
ENCODER_DATA = Path(__file__).parent / "encoders"
NAMES = {  # {checkpoint: where it lies}
    path.name: path.parent
    for folder in (DATA, ENCODER_DATA)
    for path in sorted(folder.iterdir())
    if (path / "model.safetensors").exists()
}
SHARDED = "opt-sharded"
SLOW = 5.0  # seconds that no file may take
MUCH = 2 << 30  # bytes that the process may have, when it runs by itself


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


STRANGE = (
    None, True, False, 0, 1, 2, 7, -1, 0.5, 2.0, 40, 1 << 20, 1 << 31, 1 << 40, 1 << 62, 1 << 64,
    10**400, 1e308, 5e-324, 1e30, math.nan, math.inf, -math.inf, "", "relu", "x", "\ud800", "a\nb",
    "../x", [], [0], [1, 2], [-1, 4], [1 << 62, 1 << 62], {}, {"a": 1}, nested(50), nested(300),
    [None], ["model.safetensors"], "F32", "F64", "BF16", "F8_E4M3", "I32", "U8", "BOOL", "F4",
)  # fmt: skip

LIKELY = (None, True, False, 0, 1, 2, 3, 4, 8, 0.5, 1.0, 1000.0, "relu", "silu", "gelu", [], {})


DTYPES = ("f32", None, "bf16")


def one_of(random, values):
    return values[random.integers(len(values))]


def spots(value, depth=4):
    """Every (object or list, its key) inside a JSON value."""
    if depth and isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from spots(value[key], depth - 1)


def changed(random, value):
    """A JSON value with some of its parts replaced, left out or doubled."""
    value = copy.deepcopy(value)
    for _ in range(one_of(random, (1, 1, 1, 2, 4))):
        found = list(spots(value))
        if not found:
            return one_of(random, STRANGE)
        place, key = one_of(random, found)
        what = random.integers(5)
        if what == 0:
            del place[key]
        elif what == 1 and isinstance(place, dict):
            place[one_of(random, ("x", "", "__metadata__", "model_type", *place))] = place[key]
        elif what == 2:
            place[key] = one_of(random, found)[0]  # which may hold itself
        else:
            place[key] = copy.deepcopy(one_of(random, one_of(random, (STRANGE, LIKELY))))
    return value


def dumped(value):
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):  # it holds itself
        return b"[" * 2000


def damaged(random, raw):
    """Bytes with some of them changed, cut off or put in."""
    raw, at = bytearray(raw), int(random.integers(len(raw) + 1))
    what = random.integers(4)
    if what == 0:
        return bytes(raw[:at])
    if what == 1:
        return bytes(raw[:at] + bytes(random.integers(0, 256, 9, dtype=np.uint8)) + raw[at:])
    for _ in range(random.integers(1, 6)):
        if raw:
            raw[int(random.integers(len(raw)))] = random.integers(256)
    return bytes(raw)


def json_changed(random, raw):
    return dumped(changed(random, json.loads(raw)))


def header_changed(random, raw):
    """A safetensors file with another header."""
    length = int.from_bytes(raw[:8], "little")
    header = dumped(changed(random, json.loads(raw[8 : 8 + length])))
    if random.random() < 0.1:
        length = int(one_of(random, (0, 1, len(header) + 1, 1 << 40, (1 << 64) - 1)))
        return length.to_bytes(8, "little") + header + raw[8 + length :]
    return len(header).to_bytes(8, "little") + header + raw[8 + int.from_bytes(raw[:8], "little") :]


def change_file(random, path):
    """Change one file of a checkpoint, as what it is or byte by byte."""
    raw, what = path.read_bytes(), random.random()
    if what < 0.02:
        path.unlink()
        return
    if what < 0.04:
        path.unlink()
        path.mkdir()
        return
    elif what > 0.2:
        change = json_changed if path.suffix == ".json" else header_changed
        try:
            raw = change(random, raw)
        except (ValueError, RecursionError):  # it was damaged before
            raw = damaged(random, raw)
    else:
        raw = damaged(random, raw)
    path.write_bytes(raw)


def try_checkpoint(seed, number):
    """Change a checkpoint, convert it and run it: "refused", "runs" or, wrongly, what happened."""
    random = np.random.default_rng([seed, number])
    name = SHARDED if random.random() < 0.15 else one_of(random, sorted(NAMES))
    with TemporaryDirectory() as folder:
        source = Path(folder) / "checkpoint"
        shutil.copytree(NAMES.get(name, DATA) / name, source)
        for recorded in source.glob("*.npz"):
            recorded.unlink()
        if random.random() < 0.2:
            (source / "generation_config.json").write_text('{"eos_token_id": 2}')
        return changed_and_judged(random, source)


def try_ternary(seed, number):
    """The same of a BitNet, in one of the forms in which its matrices are stored."""
    random, forms = np.random.default_rng([seed, number]), sorted(FORMS)
    with TemporaryDirectory() as folder:
        form, kind = forms[number % len(forms)], one_of(random, ("bitnet", "llama"))
        widths = one_of(random, ((24, 40), (256, 512)))
        sizes = {"hidden_size": widths[0], "neurons": widths[1], "biases": random.random() < 0.5}
        source, _ = make(Path(folder) / "checkpoint", form, kind, **sizes)
        return changed_and_judged(random, source)


def changed_and_judged(random, source):
    """Change one or two files of a checkpoint, convert it and run it."""
    files = sorted(source.iterdir())
    config = [path for path in files if path.name == "config.json"]
    for _ in range(random.integers(1, 3)):
        path = one_of(random, config * len(files) + files * 2)
        if path.is_file():
            change_file(random, path)
    return judged(source, source.parent / "x.flash", one_of(random, DTYPES))


def judged(source, path, dtype="f32"):
    begin = time.monotonic()
    try:
        convert(source, path, dtype)
    except UserError as error:
        found = "refused" if "\n" not in str(error) and len(str(error)) < 2000 else repr(error)
    except Exception:  # whatever it is, it should be a line for the user
        found = traceback.format_exc()
    else:
        found = runs(path)
    if found == "refused" and path.exists():
        return "a file was left behind"
    return found if time.monotonic() - begin < SLOW else "took too long"


def runs(path):
    try:
        with Model.open(path, context=6) as model:
            ids = [min(token, model.config.vocab_size - 1) for token in (3, 5, 40)]
            if model.config.encoder:
                found = model.encode([ids], logits=model.config.has_head)[0]
                return "runs" if found.hidden.shape[0] == 3 else "misshapen"
            logits = model.logits(ids)
            return "runs" if logits.shape == (3, model.config.vocab_size) else "misshapen"
    except UserError as error:  # such as a context of which the model has less
        return "runs not" if "context" in str(error) else f"a bundle that is refused: {error}"
    except Exception:
        return traceback.format_exc()


# ---------------------------------------------------------------------- GGUF

METADATA = (
    *(value for value in STRANGE if not isinstance(value, dict)),
    np.zeros(3, np.int32), np.array([], np.float32), ["a", "b"], 8, 16, 4, 32, 1.0, 1e-5,
    "yarn", "linear", "none", "longrope", -5, 3, 100, 0.1, 1e6, 7e-10,
)  # fmt: skip
KEYS = (
    "embedding_length", "block_count", "feed_forward_length", "context_length", "expert_count",
    "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.sliding_window",
    "attention.scale", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "embedding_scale", "residual_scale", "logit_scale", "use_parallel_residual",
    "attention.key_length_mla", "attention.value_length_mla", "attention.kv_lora_rank",
    "attention.q_lora_rank", "rope.scaling.yarn_log_multiplier", "leading_dense_block_count",
    "expert_gating_func", "expert_group_count", "expert_group_used_count", "expert_weights_scale",
    "expert_shared_count",
)  # fmt: skip
TOKENS = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")


def change_metadata(random, metadata):
    architecture = metadata["general.architecture"]
    keys = [f"{architecture}.{key}" for key in KEYS] + [f"tokenizer.ggml.{key}" for key in TOKENS]
    keys += ["general.architecture"]
    for _ in range(random.integers(1, 4)):
        key = one_of(random, keys)
        if random.random() < 0.2:
            metadata.pop(key, None)
        else:
            metadata[key] = copy.deepcopy(METADATA[random.integers(len(METADATA))])


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory):
    pytest.importorskip("gguf")
    from make_gguf import checkpoint_of, write_gguf

    folder = tmp_path_factory.mktemp("gguf")
    names = ("llama-silu", "qwen3", "phi", "phi3", "nemotron", "mixtral", "qwen2-moe", "gpt-oss",
             "granitemoe", "falcon-7b", "gemma", "llama-yarn", "gpt-neox", "gpt2",
             "arcee", "gemma2", "gemma3", "dots1", "glm4-moe", "granite", "ernie4-5-moe",
             "smollm3", "ministral3", "olmo2", "olmo3", "deepseek-v2-lite",
             "deepseek-v3")  # fmt: skip
    return [write_gguf(checkpoint_of(name, folder), folder / f"{name}.gguf") for name in names]


@pytest.mark.filterwarnings("ignore::RuntimeWarning:flashinfer.kernels")
def test_strange_metadata_is_one_line_or_runs(gguf_files, tmp_path, monkeypatch):
    seed = int(os.environ.get("FUZZ_SEED", 7))  # the same at each run
    found, right = Counter(), gguf_checkpoint.open_gguf
    for number in range(400):
        random = np.random.default_rng([seed, number])

        def opened(path, random=random):
            file = right(path)
            change_metadata(random, file.metadata)
            return file

        monkeypatch.setattr(gguf_checkpoint, "open_gguf", opened)
        outcome = judged(gguf_files[number % len(gguf_files)], tmp_path / "x.flash")
        (tmp_path / "x.flash").unlink(missing_ok=True)
        assert outcome in ("refused", "runs", "runs not"), f"seed {seed}, {number}: {outcome}"
        found[outcome] += 1
    assert min(found["refused"], found["runs"]) > 20


def test_values_of_any_depth(checkpoint, tmp_path):
    """What can just be read might not be written any more, nor read again."""
    folder = checkpoint("llama-silu")
    config = (folder / "config.json").read_text().rstrip()
    found = set()
    for depth in (10, *range(500, 1100, 7), 3000, 100_000):
        deep = f'{config[:-1]}, "deep": {"[" * depth}{"]" * depth}}}'
        (folder / "config.json").write_text(deep)
        found.add(judged(folder, tmp_path / "x.flash"))
        (tmp_path / "x.flash").unlink(missing_ok=True)
    assert found == {"refused", "runs"}


@pytest.mark.parametrize("attempt, count", [(try_checkpoint, 250), (try_ternary, 700)])
def test_damaged_checkpoints_are_one_line_or_run(attempt, count):
    seed = int(os.environ.get("FUZZ_SEED", 7))  # the same at each run
    found = Counter()
    for number in range(count):
        outcome = attempt(seed, number)
        assert outcome in ("refused", "runs", "runs not"), f"seed {seed}, {number}: {outcome}"
        found[outcome] += 1
    assert min(found["refused"], found["runs"]) > 20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MUCH, MUCH))
    found = Counter()
    for number in range(args.count):
        outcome = try_checkpoint(args.seed, number)
        if outcome not in ("refused", "runs", "runs not"):
            print(f"number {number}: {outcome}", flush=True)
            outcome = "WRONG"
        found[outcome] += 1
    print(dict(found))
    sys.exit(found["WRONG"] > 0)


if __name__ == "__main__":
    main()
