"""Hostile, damaged and mistaken files: one line that names the file, and exit code 1."""

import io
import json
import os
import warnings
import zipfile

import numpy as np
import pytest
from hostile import IDS, contents, traced, write, write_raw

from conftest import DATA
from flashinfer.oracle.replay import Replay

TOKENS = ",".join(map(str, IDS))
FIRST = "model.layers.0.input_layernorm"
ROUTER = "model.layers.1.mlp.gate"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return traced("llama-silu", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return traced("mixtral", tmp_path_factory.mktemp("mixture"))


@pytest.fixture(autouse=True)
def no_warnings():
    """A warning would be a second line on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.fixture
def refused(cli):
    """Run a command line that has to fail in one line, which says all of ``says``."""

    def run(*args, says=()):
        code, out, err = cli(*args)
        assert code == 1 and out == "", (code, out, err)
        assert err.startswith("flashinfer: error: ") and err.count("\n") == 1, err
        for part in map(str, says):
            assert part in err, err
        return err

    return run


# ---------------------------------------------------------------------- traces

METADATA = {
    "tokens too large": ("tokens", f"[{1 << 40}]", "too large"),
    "tokens beyond the vocabulary": ("tokens", "[5,17,99999,8,9,33]", "vocabulary"),
    "negative tokens": ("tokens", "[-1,2]", "whole numbers"),
    "tokens that are fractions": ("tokens", "[1.5]", "whole numbers"),
    "tokens that are truths": ("tokens", "[true]", "whole numbers"),
    "no tokens": ("tokens", "[]", "whole numbers"),
    "tokens without end": ("tokens", "[" * 9000, "not JSON"),
    "a token of many digits": ("tokens", f"[{'9' * 6000}]", "not JSON"),
    "fewer tokens": ("tokens", "[5,17]", "tensor"),
    "positions that descend": ("positions", "[1,0]", "ascending"),
    "positions twice": ("positions", "[1,1]", "ascending"),
    "positions beyond the text": ("positions", "[6]", "ascending"),
    "negative positions": ("positions", "[-1]", "whole numbers"),
    "fewer positions": ("positions", "[0,3]", "tensor"),
    "a context of nothing": ("context", "0", "context"),
    "a huge context": ("context", str(1 << 70), "context"),
    "a context that is a text": ("context", '"6"', "context"),
    "a context without end": ("context", "1e999", "context"),
    "an unknown arithmetic": ("arithmetic", "float12", "float12"),
    "an arithmetic that is missing": ("arithmetic", "missing.toml", "missing.toml"),
    "an arithmetic with a zero byte": ("arithmetic", "\0.toml", "name"),
    "an order that is a number": ("order", "5", "order"),
    "an order that is not JSON": ("order", "[", "order"),
    "a config that is a list": ("config", "[]", "config"),
    "predicted neurons": ("mode", "predicted", "predicted"),
    "another version": ("trace", "2", "version"),
    "summaries that are not there": ("summaries", "[]", "moments"),
    "summaries that are none": ("summaries", "[[1]]", "summaries"),
    "summaries with a negative shape": ("summaries", '[["a","F32",[-1],"00"]]', "summaries"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata(case, llama, refused, tmp_path):
    key, value, says = METADATA[case]
    other = write(
        tmp_path / "t.safetensors",
        {**llama.metadata, f"flashinfer.{key}": value},
        llama.arrays,
    )
    named = "missing.toml" if "missing" in value else "\0" if "\0" in value else other
    refused("compare", llama.model, other, says=[str(named).replace("\0", "?"), says])


def test_a_text_longer_than_the_model_has_positions_for(llama, refused, tmp_path):
    metadata = {"flashinfer.trace": "1", "flashinfer.tokens": json.dumps([5] * 5000)}
    other = write(tmp_path / "t.safetensors", metadata, llama.arrays)
    refused("compare", llama.model, other, says=[other, "5,000 tokens", "positions for"])


def test_metadata_that_is_no_map_of_strings(llama, refused, tmp_path):
    for metadata in ([], {"flashinfer.trace": 1}, "x", {"a": None}):
        header = json.dumps({"__metadata__": metadata}).encode()
        other = write_raw(tmp_path / "t.safetensors", header)
        refused("compare", llama.model, other, says=[other, "__metadata__"])


HEADERS = {
    "no JSON": b"{",
    "a list": b"[]",
    "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "a name twice": b'{"a":1,"a":1}',
    "offsets below 0": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
    "outside": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}',
    "overlapping": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
    "an unknown dtype": b'{"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}',
    "a huge shape": b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],'
    b'"data_offsets":[0,12]}}',
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("place", ["reference", "other", "brought"])
def test_headers(case, place, llama, refused, tmp_path):
    file = write_raw(tmp_path / "t.safetensors", HEADERS[case], b"\0" * 12)
    refused(*commands(place, llama, file, tmp_path), says=[file])


def commands(place, llama, file, folder):
    """A command line that reads ``file``."""
    out = folder / "out.safetensors"
    return {
        "reference": ("compare", file, llama.path),
        "other": ("compare", llama.model, file),
        "brought": ("trace", llama.model, "--from", file, "--tokens", TOKENS, "-o", out),
        "map": ("trace", llama.model, "--from", llama.path, "--map", file, "-o", out),
        "arithmetic": ("compare", llama.model, llama.path, "--arithmetic", file),
        "digest": ("digest", file, "--tokens", TOKENS),
        "traced": ("trace", file, "--tokens", TOKENS, "-o", out),
    }[place]


PLACES = ["reference", "other", "brought", "map", "arithmetic", "digest", "traced"]
SUFFIXES = {"map": ".toml", "arithmetic": ".toml"}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file(place, llama, refused, tmp_path):
    suffix = SUFFIXES.get(place, ".safetensors")
    empty, pipe, folder = (tmp_path / f"{name}{suffix}" for name in ("empty", "pipe", "folder"))
    folder.mkdir()
    os.mkfifo(pipe)
    for file in (pipe, folder, tmp_path / f"missing{suffix}"):
        refused(*commands(place, llama, file, tmp_path), says=[file])
    if place != "arithmetic":  # where nothing is said, it is float32
        empty.touch()
        refused(*commands(place, llama, empty, tmp_path), says=[])
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_may_not_be_read(place, llama, refused, tmp_path):
    file = tmp_path / f"secret{SUFFIXES.get(place, '.safetensors')}"
    file.write_bytes(llama.path.read_bytes())
    file.chmod(0)
    refused(*commands(place, llama, file, tmp_path), says=[file, "Permission denied"])


def test_a_header_longer_than_the_file(llama, refused, tmp_path):
    file = tmp_path / "t.safetensors"
    for length in (1 << 63, (1 << 64) - 1, 1 << 40, 1 << 20):
        file.write_bytes(length.to_bytes(8, "little") + b"{}")
        refused("compare", llama.model, file, says=[file, "header"])


def test_a_trace_that_is_cut_anywhere(llama, refused, tmp_path):
    whole, file = llama.path.read_bytes(), tmp_path / "t.safetensors"
    header = int.from_bytes(whole[:8], "little")
    for length in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header - 1, 8 + header, 8 + header + 1,
                   (len(whole) + header) // 2, len(whole) - 1):  # fmt: skip
        file.write_bytes(whole[:length])
        refused("compare", llama.model, file, says=[file])
        refused("compare", llama.path, file, says=[file])


# ---------------------------------------------------------------------- values


def test_a_trace_of_another_model(llama, mixture, cli, refused, tmp_path):
    opt = traced("opt-plain", tmp_path)
    refused("compare", opt.model, llama.path, says=[llama.path, "another model"])
    gemma = traced("gemma2", tmp_path)  # the same names and other sizes
    refused("compare", llama.model, gemma.path, says=[gemma.path, "tensor"])
    # The same names and sizes, and other weights.
    code, out, err = cli("compare", DATA / "qwen2", llama.path)
    assert code == 1 and "first wrong operation is model.layers.0.input\n" in out and err == ""


def test_some_values_are_missing(llama, cli, tmp_path):
    """What is missing is computed; a trace of one value is judged as well."""
    for keep in (lambda name: "mlp" not in name, lambda name: name == "logits"):
        kept = {name: array for name, array in llama.arrays.items() if keep(name)}
        other = write(tmp_path / "t.safetensors", llama.metadata, kept)
        code, out, err = cli("compare", llama.model, other)
        assert code == 0 and "conforms" in out and err == ""


def test_no_value_is_known(llama, refused, tmp_path):
    for arrays in ({}, {"x": np.zeros((6, 4), np.float32)}):
        other = write(tmp_path / "t.safetensors", llama.metadata, arrays)
        refused("compare", llama.model, other, says=[other, "has no value of this model"])


@pytest.mark.parametrize("shape", [(6, 3), (5, 16), (), (6,), (0, 16), (6, 2, 2, 2, 2, 7)])
def test_other_shapes(shape, llama, refused, tmp_path):
    arrays = {**llama.arrays, FIRST: np.zeros(shape, np.float32)}
    other = write(tmp_path / "t.safetensors", llama.metadata, arrays)
    refused("compare", llama.model, other, says=[other, FIRST, "shape"])


def test_other_dtypes_are_numbers_as_well(llama, cli, tmp_path):
    for dtype in (np.int64, bool, np.float64):
        arrays = {**llama.arrays, FIRST: llama.arrays[FIRST].astype(dtype)}
        other = write(tmp_path / "t.safetensors", llama.metadata, arrays)
        code, out, err = cli("compare", llama.model, other)
        assert code == (0 if dtype is np.float64 else 1) and err == ""
        assert (f"first wrong operation is {FIRST}\n" in out) == (code == 1)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 3e38])
def test_a_value_that_is_not_finite_is_wrong_there(number, llama, cli, tmp_path):
    """In every value, in all files that are written."""
    page, xml, figures = (tmp_path / name for name in ("x.html", "x.xml", "x.json"))
    for name, array in llama.arrays.items():
        if array.dtype != np.float32:
            continue
        spoiled = array.copy()
        spoiled.reshape(-1)[3] = number
        other = write(tmp_path / "t.safetensors", llama.metadata, {**llama.arrays, name: spoiled})
        code, out, err = cli("compare", llama.model, other, "--html", page, "--junit", xml,
                             "--json", figures)  # fmt: skip
        assert code == 1 and err == "" and f"first wrong operation is {name}\n" in out
        found = json.loads(figures.read_text(), parse_constant=pytest.fail)
        assert found["first_wrong"] == name
        for options in (["--run"], ["--replace", name]):
            assert cli("compare", llama.model, other, *options)[0] == 1


def test_nan_where_attention_cannot_be_judged(cli, tmp_path):
    part = traced("llama-silu", tmp_path, positions=[0, 3])
    heads = "model.layers.0.self_attn.o_proj.input"
    code, out, err = cli("compare", part.model, part.path, "--json", "-")
    verdicts = {o["name"]: o["verdict"] for o in json.loads(out)["operations"]}
    assert code == 0 and verdicts[heads] == "not judged" and err == ""
    part.arrays[heads][1, 2] = np.nan
    other = write(tmp_path / "t.safetensors", part.metadata, part.arrays)
    code, out, err = cli("compare", part.model, other)
    assert code == 1 and f"first wrong operation is {heads}\n" in out and "position 3" in out


def test_nan_in_a_summary(cli, tmp_path):
    short = traced("llama-silu", tmp_path, summary=True)
    short.arrays["moments"][4, 4] = 1  # one NaN, outside of the sample
    name = json.loads(short.metadata["flashinfer.summaries"])[4][0]
    other = write(tmp_path / "t.safetensors", short.metadata, short.arrays)
    code, out, _ = cli("compare", short.model, other)
    assert code == 1 and f"first wrong operation is {name}\n" in out


def test_nan_in_the_weights_of_the_reference(checkpoint, llama, refused):
    folder = checkpoint("llama-silu")
    file = folder / "model.safetensors"
    metadata, weights = contents(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    write(file, metadata, weights)
    refused("compare", folder, llama.path, says=[folder, "up_proj", "not finite"])


# ---------------------------------------------------------------------- summaries


def test_summaries_that_lie(cli, refused, tmp_path):
    short = traced("llama-silu", tmp_path, summary=True)
    listed = json.loads(short.metadata["flashinfer.summaries"])
    other = tmp_path / "t.safetensors"

    def spoiled(entries=listed, **arrays):
        metadata = {**short.metadata, "flashinfer.summaries": json.dumps(entries)}
        return write(other, metadata, {**short.arrays, **arrays})

    sample = short.arrays["sample"]
    for file in (
        lambda: spoiled(listed[:-1]),
        lambda: spoiled([*listed, listed[0]][1:] + [["x", "F32", [1], "0"]]),
        lambda: spoiled(sample=sample[:, :7]),
        lambda: spoiled(sample=sample.astype(np.float32)),
        lambda: spoiled(moments=sample),
        lambda: spoiled([[n, d, [1 << 62] * 3, h] for n, d, _, h in listed]),
    ):
        refused("compare", short.model, file(), says=[other])
    refused("compare", short.model, short.path, "--replace", "*", says=[short.path, "summaries"])


def test_a_summary_of_a_mixture(cli, tmp_path):
    short = traced("mixtral", tmp_path, summary=True)
    code, out, err = cli("compare", short.model, short.path)
    assert code == 0 and "conforms" in out and err == ""


# ---------------------------------------------------------------------- mixtures


def test_choices_out_of_range(mixture, cli, refused, tmp_path):
    name, file = f"{ROUTER}.choices", tmp_path / "t.safetensors"
    for expert in (-1, 99, 1 << 30, -(1 << 31)):
        chosen = mixture.arrays[name].copy()
        chosen[2, 0] = expert
        write(file, mixture.metadata, {**mixture.arrays, name: chosen})
        refused("compare", mixture.model, file, says=[file, name, expert])
    chosen = mixture.arrays[name].copy()
    chosen[2] = chosen[2, 0]
    write(file, mixture.metadata, {**mixture.arrays, name: chosen})
    code, out, err = cli("compare", mixture.model, file, "--html", tmp_path / "x.html")
    assert code == 1 and f"first wrong operation is {name}\n" in out and err == ""
    for strange in (chosen.astype(np.float32), chosen.reshape(-1), chosen[:, :1]):
        write(file, mixture.metadata, {**mixture.arrays, name: strange})
        refused("compare", mixture.model, file, says=[file, name])


def test_logits_of_a_router_that_are_not_finite(mixture, cli, tmp_path):
    logits = mixture.arrays[ROUTER].copy()
    logits[2, 1] = np.nan
    file = write(tmp_path / "t.safetensors", mixture.metadata, {**mixture.arrays, ROUTER: logits})
    code, out, err = cli("compare", mixture.model, file, "--html", tmp_path / "x.html")
    assert code == 1 and f"first wrong operation is {ROUTER}\n" in out and err == ""


def test_a_mixture_without_choices(mixture, cli, tmp_path):
    """Weights alone do not say whose they are, and are not judged."""
    arrays = {n: a for n, a in mixture.arrays.items() if not n.endswith(".choices")}
    arrays[f"{ROUTER}.weights"] = arrays[f"{ROUTER}.weights"][:, ::-1]
    file = write(tmp_path / "t.safetensors", mixture.metadata, arrays)
    code, out, err = cli("compare", mixture.model, file)
    assert code == 0 and "conforms" in out and err == ""


def test_one_token(cli, tmp_path):
    for name in ("llama-silu", "mixtral"):
        one = traced(name, tmp_path, ids=[5])
        code, out, err = cli("compare", one.model, one.path, "--html", tmp_path / "x.html")
        assert code == 0 and "conforms" in out and err == ""


# ---------------------------------------------------------------------- arrays and name maps


def npz(path, members, **options):
    """A zip file of any bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return path


def npy(array):
    raw = io.BytesIO()
    np.save(raw, array)
    return raw.getvalue()


def lying(shape, dtype="<f4"):
    """An .npy whose header says more than there is."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def test_arrays_that_are_damaged(llama, refused, tmp_path):
    sound = npy(llama.arrays["logits"])
    objects = npy(np.array([{}, None], dtype=object))
    for raw in (b"", sound[:50], sound[:-1], objects, lying((1 << 40,)), lying((6, 1 << 61)),
                lying((10**30,)), lying((-1,)), lying("'x'"), lying((6, 96), "|O"), b"PK\3\4",
                lying((6, 96), "<U4"), npy(np.zeros((6, 96), "c8")),
                npy(np.zeros((6, 95)))):  # fmt: skip
        file = tmp_path / "logits.npy"
        file.write_bytes(raw)
        refused(*commands("brought", llama, file, tmp_path), says=[file])
        file = npz(tmp_path / "x.npz", {"logits.npy": raw})
        refused(*commands("brought", llama, file, tmp_path), says=[file])
    whole = npz(tmp_path / "x.npz", {"logits.npy": sound}).read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.npz").write_bytes(whole[:length])
        refused(*commands("brought", llama, tmp_path / "x.npz", tmp_path), says=["x.npz"])
    assert not (tmp_path / "out.safetensors").exists()


def test_an_array_that_is_a_bomb(llama, refused, tmp_path):
    """Nothing is unpacked beyond what the value may have."""
    header = lying((6, 1 << 24))
    file = npz(tmp_path / "x.npz", {"logits.npy": header + bytes(6 << 26)})
    refused(*commands("brought", llama, file, tmp_path), says=[file, "logits", "more than"])


MAPS = {
    "no TOML": ("[", "TOML"),
    "an unknown key": ("tokenz = [1]", "tokenz"),
    "tokens that are texts": ('tokens = ["1"]', "tokens"),
    "negative tokens": ("tokens = [-1]", "tokens"),
    "tokens beyond the vocabulary": (f"tokens = [{10**30}]", "tokens"),
    "an engine that is a number": ("engine = 5", "engine"),
    "an unknown arithmetic": (f"arithmetic = 'half'\ntokens = {IDS}", "half"),
    "names that are numbers": ("[names]\na = 1", "names"),
    "a layer on their side only": ("[names]\n'a{}' = 'logits'", "{}"),
    "a layer on our side only": ("[names]\n'a' = 'model.layers.{}'", "{}"),
    "two layers": ("[names]\n'a{}{}' = 'b{}{}'", "{}"),
    "an unknown value": (f"tokens = {IDS}\n[names]\n'logits' = 'logitz'", "logitz"),
    "nothing that is there": (f"tokens = {IDS}\n[names]\n'logit.' = 'logits'", "named in the map"),
    "two arrays of one name": (
        f"tokens = {IDS}\n[names]\n'logits' = 'logits'\n'lm_head' = 'logits'", "second"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MAPS)
def test_name_maps(case, llama, refused, tmp_path):
    text, says = MAPS[case]
    file, out = tmp_path / "map.toml", tmp_path / "out.safetensors"
    file.write_text(text)
    arrays = {n: llama.arrays["logits"] for n in ("logits", "lm_head")}
    np.savez(tmp_path / "x.npz", **arrays)
    source = tmp_path / "x.npz"
    named = source if "named in" in says else file
    refused("trace", llama.model, "--from", source, "--map", file, "-o", out, says=[named, says])
    assert not out.exists()


def test_names_are_no_patterns(llama, mixture, cli, tmp_path):
    """Characters that mean something in regular expressions mean themselves."""
    file, out = tmp_path / "map.toml", tmp_path / "out.safetensors"
    file.write_text(
        f"tokens = {IDS}\n[names]\n'a.*+[(' = 'logits'\n'({{}})$' = 'model.layers.{{}}'"
    )
    layers = {f"({i})$": llama.arrays[f"model.layers.{i}"] for i in (0, 1)}
    np.savez(tmp_path / "x.npz", **{"a.*+[(": llama.arrays["logits"].astype(float)}, **layers)
    code, _, err = cli("trace", llama.model, "--from", tmp_path / "x.npz", "--map", file, "-o", out)
    assert code == 0 and err == ""
    assert cli("compare", llama.model, out)[0] == 0


def test_all_of_a_trace_can_be_brought(mixture, cli, tmp_path):
    """Whole numbers, too, from a safetensors file."""
    out = tmp_path / "out.safetensors"
    code, _, err = cli(
        "trace", mixture.model, "--from", mixture.path, "--tokens", TOKENS, "-o", out
    )
    assert code == 0 and err == ""
    brought = contents(out)[1]
    assert brought.keys() == mixture.arrays.keys()
    assert all(np.array_equal(brought[name], mixture.arrays[name]) for name in brought)
    assert cli("compare", mixture.path, out)[0] == 0


# ---------------------------------------------------------------------- options


def test_options_that_match_nothing(llama, cli, refused, tmp_path):
    out = tmp_path / "out.safetensors"
    traces = ("trace", llama.bundle, "--tokens", TOKENS, "-o", out)
    refused("compare", llama.model, llama.path, "--replace", "nothing", says=["nothing"])
    refused(*traces, "--only", "nothing", says=["--only nothing"])
    refused(*traces, "--positions", "6", says=["--positions", "0 to 5"])
    refused(*traces, "--map", "x.toml", says=["--map"])
    refused(*commands("brought", llama, llama.path, tmp_path), "--summary", says=["--from"])
    refused("compare", llama.model, llama.path, "--arithmetic", "half", says=["--arithmetic"])
    for usage in (("--positions", "5-1"), ("--positions", "x"), ("--engine", "x")):
        code, text, err = cli(*traces, *usage)
        assert code == 2 and text == "" and usage[0] in err
    assert not out.exists()


def test_outputs_that_cannot_be_written(llama, refused, tmp_path):
    before = llama.bundle.read_bytes(), llama.path.read_bytes()
    compares = ("compare", llama.bundle, llama.path)
    x, missing = tmp_path / "x", tmp_path / "missing" / "x"
    for option in ("--html", "--junit", "--json"):
        for target in (tmp_path, missing, llama.bundle, llama.path):
            refused(*compares, option, target, says=[target])
    refused(*compares, "--html", x, "--junit", x, says=[x, "twice"])
    traces = ("trace", llama.bundle, "--tokens", TOKENS, "-o")
    for target in (tmp_path, missing, llama.bundle):
        refused(*traces, target, says=[target])
    file = tmp_path / "map.toml"
    file.write_text(f"tokens = {IDS}")
    for target in (file, llama.path):
        refused("trace", llama.bundle, "--from", llama.path, "--map", file, "-o", target,
                says=[target])  # fmt: skip
    assert (llama.bundle.read_bytes(), llama.path.read_bytes()) == before
    assert not x.exists() and file.read_text() == f"tokens = {IDS}"


def test_ctrl_c_leaves_nothing(llama, cli, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    files = [tmp_path / name for name in ("x.html", "x.xml", "x.json", "x.safetensors")]
    monkeypatch.setattr(Replay, "_logits", interrupt)
    code, _, err = cli("compare", llama.model, llama.path, "--html", files[0], "--junit", files[1],
                       "--json", files[2])  # fmt: skip
    assert code == 130 and err.endswith("interrupted\n")
    monkeypatch.setattr("flashinfer.oracle.trace.Recorder._give", interrupt)
    for command in (("trace", llama.bundle, "-o", files[3]), ("digest", llama.bundle)):
        code, _, err = cli(*command, "--tokens", TOKENS)
        assert code == 130 and err.endswith("interrupted\n")
    assert list(tmp_path.iterdir()) == []
