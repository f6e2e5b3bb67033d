import json
import os
import shutil

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.formats.bundle.reader import Bundle, verify
from flashinfer.formats.bundle.stored import PAGE
from flashinfer.formats.bundle.writer import new_tensor, write_bundle
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.number_formats import FORMATS


def rewritten(source, destination, change):
    """A copy of a bundle whose JSON header went through ``change``; data as it was."""
    raw = source.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length, "the change must not lengthen the header"
    destination.write_bytes(raw[:8] + text + raw[8 + length :])
    return destination


def test_is_a_safetensors_file_with_every_tensor_on_a_page(calibrated):
    with safetensors.safe_open(calibrated, "np") as file, Bundle(calibrated) as bundle:
        assert set(bundle.tensors) <= set(file.keys())
        assert file.get_tensor("layers.0.ffn.bundles").shape == (72, 80)
        assert np.array_equal(file.get_tensor("final_norm.bias"), bundle.read("final_norm.bias"))
        offsets = [info.offset for info in bundle.file.tensors.values() if info.name[0] != "_"]
        assert all(offset % PAGE == 0 for offset in offsets)
        assert os.path.getsize(calibrated) % PAGE == 0


def test_what_is_needed_at_start_comes_first_and_layers_are_contiguous(calibrated):
    with Bundle(calibrated) as bundle:
        by_offset = sorted(bundle.specs, key=lambda spec: bundle.tensors[spec.name].offset)
    roles = [spec.role for spec in by_offset]
    order = ["small", "predictor", "attention", "head", "embedding", "ffn"]
    assert roles == sorted(roles, key=order.index)


def test_verify_accepts_what_was_written(plain, calibrated):
    assert verify(plain) == os.path.getsize(plain)
    assert verify(calibrated) == os.path.getsize(calibrated)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_verify_finds_any_flipped_bit(plain, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "x.flash"
    raw = bytearray(plain.read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, 6000))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"x\.flash"):
        verify(path)


def test_verify_names_the_tensor(plain, tmp_path):
    path = shutil.copy(plain, tmp_path / "x.flash")
    with Bundle(path) as bundle:
        offset = bundle.tensors["layers.1.ffn.bundles"].offset
    with open(path, "r+b") as file:
        file.seek(offset + 5)
        file.write(b"\x55")
    with pytest.raises(FormatError, match=r"layers\.1\.ffn\.bundles"):
        verify(path)


def remove(name):
    return lambda header: header["__metadata__"].pop(name)


def config(**changes):
    def change(header):
        values = json.loads(header["__metadata__"]["flashinfer.config"])
        # Room for longer values.
        del header["__metadata__"]["flashinfer.checksums"]
        header["__metadata__"]["flashinfer.config"] = json.dumps({**values, **changes})

    return change


def calibration(value):
    def change(header):
        del header["__metadata__"]["flashinfer.checksums"]
        header["__metadata__"]["flashinfer.calibration"] = json.dumps(value)

    return change


def rename(header):
    header["layers.0.ffn.bundlex"] = header.pop("layers.0.ffn.bundles")


BAD_BUNDLES = {
    "no version": (remove("flashinfer.version"), "no flashinfer bundle"),
    "version 2": (lambda h: h["__metadata__"].update({"flashinfer.version": "2"}), "version"),
    "no config": (remove("flashinfer.config"), "model_type"),
    "missing tensor": (rename, "missing"),
    "other architecture": (config(model_type="gpt"), "supported: opt"),
    "architecture a list": (config(model_type=[]), "supported: opt"),
    "huge dimension": (config(hidden_size=10**12), "hidden_size"),
    "negative dimension": (config(ffn_dim=-1), "ffn_dim"),
    "dimension of the wrong size": (config(ffn_dim=73), "the config says"),
    "heads do not divide": (config(num_attention_heads=7), "multiple"),
    "a flag that is none": (config(enable_bias="yes"), "enable_bias"),
    "another activation": (config(activation_function="tanh"), "tanh"),
    "activation a list": (config(activation_function=[]), "activation"),
    "calibration of no layers": (calibration({"layers": []}), "calibrate it again"),
    "calibration of strings": (calibration({"layers": ["a", "b"]}), "calibrat"),
    "calibration a list": (calibration([1]), "calibration"),
}


@pytest.mark.parametrize("change, says", BAD_BUNDLES.values(), ids=BAD_BUNDLES)
def test_bad_bundle_is_one_line(plain, tmp_path, change, says):
    path = rewritten(plain, tmp_path / "bad.flash", change)
    with pytest.raises(FormatError, match=says) as caught:
        Bundle(path)
    assert "bad.flash" in str(caught.value) and "\n" not in str(caught.value)


def test_directory_suggests_convert(tmp_path):
    with pytest.raises(FormatError, match="flashinfer convert"):
        Bundle(tmp_path)


def small_tensors(chunks=lambda: [np.zeros((3, 5), dtype=np.float32)]):
    return [new_tensor("a", FORMATS["f16"], (3, 5), chunks)]


class Stop(Exception):
    pass


def stopping():
    yield np.zeros((1, 5), dtype=np.float32)
    raise Stop


@pytest.mark.parametrize("nameless", [True, False])
def test_a_write_that_stops_leaves_nothing(tmp_path, monkeypatch, nameless):
    if not nameless:
        monkeypatch.setattr(os, "O_TMPFILE", 1 << 30)  # as where there is no such flag
    target = tmp_path / "x.flash"
    target.write_bytes(b"before")
    with pytest.raises(Stop):
        write_bundle(target, small_tensors(stopping), {}, {})
    assert os.listdir(tmp_path) == ["x.flash"] and target.read_bytes() == b"before"
    write_bundle(target, small_tensors(), {}, {})
    assert os.listdir(tmp_path) == ["x.flash"] and target.stat().st_size == 2 * PAGE
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_full_disk_is_one_line(tmp_path):
    target = "/dev/full" if os.path.exists("/dev/full") else None
    if target is None:
        pytest.skip("no /dev/full here")
    huge = [new_tensor("a", FORMATS["f32"], (1 << 40, 1 << 10), lambda: [])]
    with pytest.raises(UserError, match="disk is full"):
        write_bundle(tmp_path / "x.flash", huge, {}, {})
    assert os.listdir(tmp_path) == []


def test_writing_where_one_may_not(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_bundle(tmp_path / "none" / "x.flash", small_tensors(), {}, {})
    with pytest.raises(UserError, match="is a directory"):
        write_bundle(tmp_path, small_tensors(), {}, {})
