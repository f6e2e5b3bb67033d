"""Conformance kits: the same bytes everywhere, checked, and made without other libraries."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from random_configs import ENCODERS

from flashinfer import kernels
from flashinfer.formats.architectures import ARCHITECTURES, model_config
from flashinfer.formats.errors import UserError
from flashinfer.formats.safetensors import SafetensorsFile
from flashinfer.formats.sources.gguf_forms import FORMS
from flashinfer.oracle.kits import draws
from flashinfer.oracle.kits.check import MOST_FILE, check_kit
from flashinfer.oracle.kits.configs import MODELS
from flashinfer.oracle.kits.gguf_form import gguf_architecture
from flashinfer.oracle.kits.kit import MANIFEST, chosen_models, goldens_of, write_kit
from kit_hashes import COMMITTED, hashes

pytestmark = pytest.mark.skipif(kernels.in_use != "native", reason="no compiled kernels")
MOST_KIT = 100 << 20  # bytes
# Names of one architecture, of which the kit has one.
ALIASES = {"ministral": "mistral", "turbosparsemistral": "bamboo"}


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A whole kit."""
    folder = tmp_path_factory.mktemp("kit") / "kit"
    write_kit(folder)
    return folder


@pytest.fixture
def small_kit(tmp_path):
    """A kit with few models, which a test may spoil."""
    folder = tmp_path / "small"
    write_kit(folder, ["phi3"])
    return folder


def change(folder, name, content, listed=True):
    """Replace a file of a kit; listed: in the manifest, too."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    if listed:
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def logits_of(path):
    with SafetensorsFile(path) as file:
        return file.read_rows("logits")


def test_bytes_are_those_committed(kit):
    made = hashes(json.loads((kit / MANIFEST).read_text()))
    committed = json.loads(COMMITTED.read_text())
    assert [name for name in committed if committed[name] != made.get(name)] == []
    assert made.keys() == committed.keys()


@pytest.mark.parametrize("environment", [
    {"FLASHINFER_VECTOR_UNIT": "plain"},
    {"NPY_DISABLE_CPU_FEATURES": " ".join(np._core._multiarray_umath.__cpu_dispatch__)},
], ids=str)  # fmt: skip
def test_bytes_depend_on_no_cpu(environment):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", COMMITTED.with_suffix(".py")], text=True,
        capture_output=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == json.loads(COMMITTED.read_text())


def test_the_manifest_lists_every_file(kit):
    files = json.loads((kit / MANIFEST).read_text())["files"]
    there = {
        p.relative_to(kit).as_posix(): p.stat().st_size for p in kit.rglob("*.*") if p.is_file()
    }
    del there[MANIFEST]
    assert {name: entry["bytes"] for name, entry in files.items()} == there
    assert max(there.values()) <= MOST_FILE and sum(there.values()) <= MOST_KIT


def test_every_architecture_is_in_it():
    writing = ARCHITECTURES.keys() - set(ENCODERS)
    assert {m.model_type for m in MODELS} == {ALIASES.get(name, name) for name in writing}
    models = [m for m in MODELS if m.gguf]
    configs = [model_config(m.hugging_face_config()) for m in models]
    found = zip(configs, models, strict=True)
    assert {gguf_architecture(c, m.model_type) for c, m in found} == FORMS.keys()


def test_a_kit_is_right_and_says_so(small_kit, cli):
    code, out, err = cli("kit", small_kit, "--check")
    assert code == 0 and "models are right" in out, err
    code, out, err = cli("kit", small_kit, "--check", "--json", "-")
    assert code == 0, err
    figures = json.loads(out)
    assert (
        figures["models"] == len(chosen_models(["phi3"])) == 4
        and figures["version"] == draws.VERSION
    )
    assert figures["differences"] == []
    assert set(figures) <= {"schema", "kit", "version", "models", "files", "differences",
                            "not_checked"}  # fmt: skip


@pytest.mark.parametrize("model", [m for m in MODELS if m.gguf], ids=lambda m: m.name)
def test_gguf_has_the_logits_of_the_checkpoint(kit, model):
    checkpoint, *files = goldens_of(model)
    expected = logits_of(kit / checkpoint.logits)
    assert 0.3 < expected.std() < 6
    for format, golden in zip(model.gguf, files, strict=True):
        difference = np.abs(logits_of(kit / golden.logits) - expected)
        # Every weight of the kit is a float16; 8 and 4 bits round them. Keys and values are float16
        # there, too, and a gated delta net brings what follows from it to a length of 1.
        most = 1e-3 if "linear_num_key_heads" in model.config else 1e-4
        assert difference.max() <= most if format == "f16" else 1e-3 < difference.mean() < 1


def test_logits_depend_on_every_tensor(small_kit):
    """Our engine finds a golden that is not its own, and a model that is another one."""
    golden = goldens_of(next(m for m in MODELS if m.name == "phi3"))[0]
    raw = bytearray((small_kit / golden.logits).read_bytes())
    raw[-1] ^= 0x40  # of the tokens, which come last: its logits stay
    change(small_kit, golden.logits, bytes(raw))
    assert len(check_kit(small_kit).differences) == 1
    raw = bytearray((small_kit / "models/phi3/model.safetensors").read_bytes())
    raw[-1] ^= 0x40
    change(small_kit, "models/phi3/model.safetensors", bytes(raw))
    found = check_kit(small_kit).differences
    assert len(found) == 1 and "logits differ" in found[0]


def test_last_bits_count_with_compiled_kernels_only(small_kit, twin):
    path = small_kit / "models/phi3/logits.safetensors"
    raw = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    raw[begin] ^= 1  # the last bit of the first logit
    change(small_kit, "models/phi3/logits.safetensors", bytes(raw))
    found = check_kit(small_kit).differences
    assert len(found) == (twin == "native"), found


@pytest.mark.parametrize("name", ["number_formats/q4_0.safetensors", "samplers/cases.json",
                                  "chats/chatml/cases.json"])  # fmt: skip
def test_other_parts_are_checked(small_kit, name):
    raw = bytearray((small_kit / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    change(small_kit, name, bytes(raw))
    found = check_kit(small_kit).differences
    assert len(found) == 1 and name in found[0]


def test_hashes_are_checked(small_kit, cli):
    (small_kit / "models/phi3/config.json").unlink()
    name = "samplers/cases.json"
    change(small_kit, name, (small_kit / name).read_bytes()[:-1] + b" ", listed=False)
    code, _, err = cli("kit", small_kit, "--check")
    assert code == 1 and err.count("\n") == 4
    assert "phi3/config.json: No such file" in err and "cases.json: its SHA-256" in err


@pytest.mark.parametrize("entry", [
    {"../outside": {"bytes": 1, "sha256": ""}}, {"/etc/passwd": {"bytes": 1, "sha256": ""}},
    {"a": {"bytes": 1 << 40, "sha256": ""}}, {"a": {"bytes": -1, "sha256": ""}}, {"a": []},
    {"a": {"bytes": 1, "sha256": 5}}, {}, [], None, {"": {"bytes": 1, "sha256": ""}},
])  # fmt: skip
def test_hostile_manifests_give_one_line(tmp_path, cli, entry):
    manifest = {"version": draws.VERSION, "files": entry}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    code, out, err = cli("kit", tmp_path, "--check")
    assert code == 1 and out == "" and err.count("\n") == 1 and MANIFEST in err


@pytest.mark.parametrize("key", ["tokens", "files", "tolerance"])
def test_the_manifest_is_checked(small_kit, key):
    manifest = json.loads((small_kit / MANIFEST).read_text())
    if key == "tokens":
        manifest["models"][0]["tokens"][3] += 1
    elif key == "files":
        del manifest["files"]["models/phi3/logits.safetensors"]
    else:
        manifest["tolerance"] = 1
    (small_kit / MANIFEST).write_text(json.dumps(manifest))
    found = check_kit(small_kit).differences
    assert len(found) == 1 and MANIFEST in found[0]


def test_another_version_is_refused(small_kit, cli):
    manifest = json.loads((small_kit / MANIFEST).read_text())
    (small_kit / MANIFEST).write_text(json.dumps({**manifest, "version": 99}))
    code, _, err = cli("kit", small_kit, "--check")
    assert code == 1 and "version 99" in err


def test_wrong_targets(tmp_path, cli):
    (tmp_path / "file").write_text("")
    for target in (tmp_path, tmp_path / "file", tmp_path / "no" / "where"):
        code, _, err = cli("kit", target, "--arch", "opt")
        assert code == 1 and err.count("\n") == 1 and str(target) in err
    code, _, err = cli("kit", tmp_path / "new", "--arch", "bert")
    assert code == 1 and "--arch bert" in err and "qwen2_moe" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert cli("kit", tmp_path, "--check", "--arch", "opt")[0] == 2


def test_numpy_kernels_write_no_kit(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "in_use", "numpy")
    with pytest.raises(UserError, match="compiled kernels"):
        write_kit(tmp_path / "kit")


def test_neither_torch_nor_other_libraries_are_needed(tmp_path):
    """A kit is written, and another engine's harness can read all of it, with NumPy alone."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'gguf', 'safetensors', 'tokenizers', 'jinja2'):\n"
        "    sys.modules[name] = None\n"
        "from flashinfer.cli.main import main\n"
        "kit = sys.argv[1:]\n"
        "sys.exit(main([*kit, '--arch', 'gpt_oss']) or main([*kit, '--check']))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "kit", tmp_path / "kit"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "models are right" in run.stdout
    assert "not checked: tokenizers and chat templates" in run.stderr


def test_draws():
    words = draws.raw_bytes("a", 6).view("<u2").astype(int)
    assert draws.uniform("a", (3,), 0.5).tolist() == [(2 * (w >> 5) - 2047) / 4096 for w in words]
    values = draws.uniform("b", (40, 50), 2.0**-13)
    assert np.array_equal(values.astype(np.float16).astype(np.float32), values)
    assert abs(values.mean()) < 2.0**-13 / 20
    whole = draws.whole_numbers("c", 1000, 3, 5)
    assert set(whole.tolist()) == {3, 4, 5}
    assert [draws.power_of_two(v) for v in (1, 1.4, 1.5, 3, 0.3)] == [1, 1, 2, 4, 0.25]


def test_a_kit_takes_the_place_of_an_empty_directory(tmp_path, kit):
    target = tmp_path / "empty"
    target.mkdir()
    write_kit(target, ["opt"])
    name = "models/opt-plain/model.safetensors"
    assert (target / name).read_bytes() == (kit / name).read_bytes()
    shutil.rmtree(target)
    assert list(tmp_path.iterdir()) == []  # no temporary files stay
