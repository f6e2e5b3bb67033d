"""Headers that ask for far more memory than they have bytes: refused before they are parsed."""

import json
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bundle import rewritten

from bench.cgroup import NoCgroups, run_limited
from flashinfer.formats import bounded_json
from flashinfer.formats.bounded_json import parse, parsed_bytes
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import FormatError
from flashinfer.formats.sources.gguf import GgufFile

MIB = 1 << 20
PROGRAM = """
import sys
from flashinfer.cli.main import main
from flashinfer.plan.memory import peak_rss
before = peak_rss()
code = main(sys.argv[1:])
print(code, peak_rss() - before)
"""
FILL = {
    "lists": b"[],", "objects": b"{},", "objects of lists": b'{"":[]},', "strings": b'"aa",',
    "numbers": b"999,", "nested": b"[[[[[[]]]]]],", "wide": '"\N{EURO SIGN}",'.encode(),
    "escaped": b'"\\u20ac",', "keys": None,
}  # fmt: skip


def hostile(fill, nbytes):
    """A list, or an object of keys, of so many bytes."""
    if fill is None:
        return b"{" + b",".join(b'"%x":0' % i for i in range(nbytes // 10)) + b"}"
    return b"[" + fill * (nbytes // len(fill)) + b"0]"


@pytest.mark.parametrize("fill", FILL.values(), ids=FILL)
def test_what_parsing_takes_is_never_more_than_was_said(fill):
    raw = hostile(fill, 1 << 20)
    tracemalloc.start()
    parse(raw, "x", most=1 << 40, unique=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert parsed_bytes(raw) / 4 < peak < parsed_bytes(raw) + 65536


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=100,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(values, st.booleans())
def test_any_value_takes_no_more_than_was_said(value, ascii_only):
    raw = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    tracemalloc.start()
    assert parse(raw, "x") == value
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < parsed_bytes(raw) + 32768


def measured(*command):
    """(exit code, bytes that it took, what it said) of a command in a process of its own."""
    words = [sys.executable, "-c", PROGRAM, *map(str, command)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=120)
    code, taken = map(int, run.stdout.split()[-2:])
    return code, taken, run.stderr


@pytest.mark.parametrize("where", ["shape", "metadata", "whole"])
@pytest.mark.parametrize("kind", ["lists", "keys"])
def test_a_header_of_30_million_bytes_takes_little_more_than_its_bytes(tmp_path, kind, where):
    path, inner = tmp_path / "x.flash", hostile(FILL[kind], 30_000_000)
    if where == "shape":
        inner = b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":' + inner + b"}}"
    elif where == "metadata":
        escaped = inner.replace(b'"', b'\\"').replace(b"[", b"\\u005b")
        inner = b'{"__metadata__":{"flashinfer.version":"1","flashinfer.config":"%s"}}' % escaped
    with open(path, "wb") as file:
        file.write(len(inner[:99_999_999]).to_bytes(8, "little") + inner[:99_999_999])
    code, taken, err = measured("verify" if where == "whole" else "inspect", path)
    assert code == 1 and err.count("\n") == 1 and "of memory" in err, err
    assert taken < 1.2 * len(inner) + 16 * MIB, taken / MIB


def test_a_budget_bounds_the_header(tmp_path):
    """In a cgroup of exactly the budget, which the kernel holds."""
    path, inner = tmp_path / "x.flash", hostile(b"[],", 6_000_000)
    path.write_bytes(len(inner).to_bytes(8, "little") + inner)
    command = [sys.executable, "-m", "flashinfer", "run", path, "--tokens", "5", "--memory"]
    try:
        run = run_limited([*command, "160M"], 160 * MIB, capture_output=True, text=True)
    except NoCgroups as error:
        pytest.skip(str(error))
    assert run.returncode == 1 and "could take" in run.stderr and run.stderr.count("\n") == 1


def test_a_model_of_4096_layers_is_no_attack():
    """60,000 tensors, with a padding and a checksum each, and numbers of a calibration."""
    entry = (
        '"layers.{0}.predictor.bias":{{"dtype":"F32","shape":[4096,4096],"data_offsets":[{0},{0}]}}'
    )
    tensors = ",".join(entry.format(10**10 + i) for i in range(60_000))
    pads = ",".join(entry.format(10**10 + i).replace("layers", "_pad") for i in range(60_000))
    names = [f"layers.{i}.predictor.b.weight" for i in range(60_000)]
    sums = json.dumps(json.dumps(dict.fromkeys(names, "01234567")))
    numbers = json.dumps(json.dumps([[1.23456789012345] * 33] * 4096))
    header = f'{{"__metadata__":{{"a":{sums},"b":{numbers}}},{tensors},{pads}}}'.encode()
    assert parsed_bytes(header) < bounded_json.MOST
    assert len(parse(header, "x", unique=True)) == 120_001


@pytest.mark.parametrize("nested", [63, 65, 900, 100_000])
def test_nesting_is_bounded(plain, tmp_path, nested):
    raw = b"[" * nested + b"]" * nested
    if nested < 64:
        assert parse(raw, "x")
        return
    with pytest.raises(FormatError, match=r"^x: not JSON: (nested more than 64|maximum recursion)"):
        parse(raw, "x")


def test_texts_in_the_metadata_are_bounded_together(plain, tmp_path):
    """What each may take, the others may not."""

    def change(header):
        del header["__metadata__"]["flashinfer.checksums"]
        header["__metadata__"]["flashinfer.source"] = '{"a":[%s]}' % ",".join("1" * 300)  # noqa: UP031

    path = rewritten(plain, tmp_path / "x.flash", change)
    with Bundle(path) as bundle:
        needed = parsed_bytes(bundle.file.metadata["flashinfer.source"].encode())
        rest = bounded_json.MOST - bundle.memory
    assert needed > 12_000
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    whole = parsed_bytes(path.read_bytes()[8:header])
    with pytest.raises(FormatError, match=r"x\.flash.* could take 0 MiB"):
        Bundle(path, memory=whole - 1)
    assert rest < whole


# ---------------------------------------------------------------------- GGUF


def gguf(tmp_path, metadata, n_values=1, n_tensors=0):
    path = tmp_path / "x.gguf"
    begin = b"GGUF" + (3).to_bytes(4, "little")
    begin += n_tensors.to_bytes(8, "little") + n_values.to_bytes(8, "little")
    path.write_bytes(begin + metadata)
    return path


def key(name, kind):
    return len(name).to_bytes(8, "little") + name + kind.to_bytes(4, "little")


GGUF_LIES = {
    "strings": key(b"a", 9) + b"\x08\0\0\0" + (10**7).to_bytes(8, "little") + bytes(8 * 10**7),
    "one text": key(b"a", 8) + (10**8).to_bytes(8, "little") + b"a" * 10**8,
    "keys": key(b"a", 0) * (6 * 10**6),
}


@pytest.mark.parametrize("kind", GGUF_LIES)
def test_a_gguf_header_is_bounded(tmp_path, kind):
    n = 6 * 10**6 if kind == "keys" else 1
    path = gguf(tmp_path, GGUF_LIES[kind], n)
    tracemalloc.start()
    with pytest.raises(FormatError, match="would take more than 256 MiB of memory"):
        GgufFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * MIB
    if kind != "strings":
        assert peak < 2 * MIB
