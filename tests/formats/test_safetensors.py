"""The header parser against files that lie (safetensors' own attacks among them)."""

import errno
import json
import os
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.formats.errors import FormatError
from flashinfer.formats.safetensors import SafetensorsFile, parse_header


def write(path, header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_library_writes(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": values, "b": values.astype(np.float16)}, path, {"k": "v"})
    with SafetensorsFile(path) as file:
        assert file.metadata == {"k": "v"}
        assert np.array_equal(file.read_rows("a"), values)
        assert np.array_equal(file.read_rows("b", 1, 3), values[1:3])


BAD_HEADERS = {
    "not JSON": b"{",
    "not UTF-8": b'{"\xff": 1}',
    "not an object": b"[]",
    "deep nesting": b"[" * 100_000,
    "huge number": b'{"a": ' + b"9" * 5000 + b"}",
    "name twice": b'{"a": 1, "a": 2}',
    "metadata not strings": {"__metadata__": {"a": 1}},
    "metadata a list": {"__metadata__": []},
    "entry not an object": {"a": 3},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "unknown dtype": {"a": entry("F31")},
    "dtype a list": {"a": entry(["F32"])},
    "negative shape": {"a": entry(shape=(-2,))},
    "shape of floats": {"a": entry(shape=(2.0,))},
    "shape of booleans": {"a": entry(shape=(True, 2))},
    "shape overflows": {"a": entry(shape=(2**62, 2**62, 4))},
    "many axes": {"a": entry(shape=(1,) * 30 + (2,))},
    "shape does not fit": {"a": entry(shape=(3,))},
    "offsets reversed": {"a": entry(offsets=(8, 0))},
    "outside the file": {"a": entry(offsets=(0, 16), shape=(4,))},
    "one offset": {"a": entry(offsets=(0,))},
    "overlap": {"a": entry(), "b": entry(offsets=(4, 12))},
    "same place": {"a": entry(), "b": entry()},
    "hole": {"a": entry(shape=(1,), offsets=(4, 8))},
    "not all the data": {"a": entry(shape=(1,), offsets=(0, 4))},
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_header_is_one_line(tmp_path, header):
    path = write(tmp_path / "bad.safetensors", header, bytes(8))
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x01", bytes(7), (2**63).to_bytes(8, "little"), (10**9).to_bytes(8, "little") + b"{}"],
    ids=["empty", "a byte", "seven bytes", "length 2^63", "length beyond the file"],
)
def test_cut_or_huge_header(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"bad\.safetensors"):
        SafetensorsFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(FormatError, match="No such file"):
        SafetensorsFile(tmp_path / "none")
    with pytest.raises(FormatError, match="directory"):
        SafetensorsFile(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "", "Q9"]) | json_values,
        "shape": st.lists(st.integers(-1, 2**70), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-1, 2**70), max_size=3) | json_values,
    }
)


@given(st.dictionaries(st.text(max_size=4), entries | json_values, max_size=4), st.integers(0, 64))
def test_any_json_is_parsed_or_refused(header, data_bytes):
    try:
        _, tensors = parse_header(json.dumps(header).encode(), data_bytes, 0, "x")
    except FormatError as error:
        assert "\n" not in str(error)
    else:
        assert sum(info.nbytes for info in tensors.values()) == data_bytes


@given(st.binary(max_size=200), st.integers(0, 64))
def test_any_bytes_are_parsed_or_refused(header, data_bytes):
    try:
        parse_header(header, data_bytes, 0, "x")
    except FormatError as error:
        assert "\n" not in str(error)


@settings(max_examples=200)
@given(st.data())
def test_mutated_file_is_opened_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("m") / "m.safetensors"
    good = safetensors.numpy.save({"a": np.arange(6, dtype=np.float32), "b": np.zeros((2, 2))})
    place = data.draw(st.integers(0, len(good) - 1))
    change = data.draw(st.binary(max_size=8))
    drop = data.draw(st.integers(0, 8))
    path.write_bytes(good[:place] + change + good[place + drop :])
    tracemalloc.start()
    try:
        with SafetensorsFile(path) as file:
            for name in file.tensors:
                info = file.tensors[name]
                file.read_bytes(info.offset, info.nbytes)
    except FormatError as error:
        assert "\n" not in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_an_error_of_the_disk_names_the_header(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    real = os.preadv

    def failing(descriptor, buffers, offset):
        if offset >= 8:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(FormatError, match=r"x\.safetensors: reading 2 bytes at 8: Input/output"):
        SafetensorsFile(path)


def test_a_name_of_megabytes_gives_a_short_line(tmp_path):
    path, name = tmp_path / "x.safetensors", "n" * (8 << 20)
    header = json.dumps({name: {"dtype": "F9", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(FormatError, match=r"unknown dtype 'F9'") as raised:
        SafetensorsFile(path)
    assert len(str(raised.value)) < 400
    line = str(FormatError(f"{path}: {name}: what is wrong"))
    assert len(line) <= 1000 and line.startswith(str(path)) and line.endswith("what is wrong")
