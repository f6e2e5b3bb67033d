"""Hostile files, at random and repeatably: bundles, GGUF files and profiles, changed and then used.

    python tests/fuzz_files.py --count 8000 --kind bundle

Whatever a file holds, a command ends with 0, or with 1 and one line that says why: no other
exception, no warning, no control character on the terminal, no more than some memory and seconds.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

from flashinfer.calibration.calibrate import calibrate
from flashinfer.cli.main import main
from flashinfer.formats.convert import convert
from flashinfer.formats.sources.gguf import GgufFile
from flashinfer.plan import profile
from flashinfer.plan.memory import peak_rss

DATA = Path(__file__).parent / "data"
SPARE_BYTES = 1 << 30  # of address space that a case may take
SECONDS = 60  # for a case
DEEP = json.loads("[" * 90 + "]" * 90)
JUNK = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e-12, 5e-324, 1e308, 1 << 31, (1 << 63) - 1,
    10**400, -(10**400), float("nan"), float("inf"), "@1e400@", "", "a", "1", "\ud800", "\0",
    "\x1b[31mred\x07", "x" * 3000, "relu", "cats", [], {}, [[]], {"": None}, [1, 2], ["a"], DEEP,
    [0.1] * 8, [0.1] * 17, [1e308] * 8,
)  # fmt: skip


def check(*command):
    """Run a command in this process: its exit code. Raises AssertionError where it misbehaves."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in command])
    said = err.getvalue()
    assert code in (0, 1), f"exit code {code}"
    if code == 1:
        last = said.splitlines()[-1]
        assert last.startswith("flashinfer: error: ") and said.endswith("\n"), said
        assert "out of memory" not in last, last
    for text in (out.getvalue(), said):
        strange = {c for c in text if not c.isprintable()} - {"\n"}
        assert not strange, f"unprintable {strange} in {text!r}"
    return code


# ---------------------------------------------------------------------- changing what JSON says


def changed(value, random):
    """JSON's ``value`` with one change somewhere, in texts that are JSON themselves, too."""
    if isinstance(value, str) and value[:1] in ("{", "[") and random.random() < 0.9:
        with contextlib.suppress(ValueError):
            return as_text(changed(json.loads(value), random))
    if isinstance(value, (dict, list)) and value and random.random() < 0.93:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[random.integers(len(keys))]
        copy = value.copy()
        kind = random.random()
        if kind < 0.12:
            del copy[key]
        elif kind < 0.17 and isinstance(copy, dict):
            copy[str(junk(random))] = copy.pop(key)
        elif kind < 0.22:
            copy[key] = value[keys[random.integers(len(keys))]]
        else:
            copy[key] = changed(value[key], random)
        return copy
    if isinstance(value, (int, float)) and not isinstance(value, bool) and random.random() < 0.4:
        with contextlib.suppress(OverflowError):
            values = value + 1, value - 1, value * 2, -value, value * 1e9, value / 1e9
            return values[random.integers(len(values))]
    return junk(random)


def junk(random):
    return JUNK[random.integers(len(JUNK))]


def as_text(value):
    return json.dumps(value, default=lambda number: number.item()).replace('"@1e400@"', "1e400")


# ---------------------------------------------------------------------- each kind of file


class Bundles:
    """Bundles of four kinds: calibrated, with a layout, a mixture of experts, without a ReLU."""

    def __init__(self, folder):
        self.folder, self.files = folder, []
        ids = np.random.default_rng(5).integers(3, 96, 600)
        for name in ("opt-plain", "olmoe", "llama-silu"):
            path = folder / f"{name}.flash"
            convert(DATA / name, path, "f32" if name != "llama-silu" else "f16")
            if name != "llama-silu":
                calibrate(path, ids, text="random", tokens=600, steps=2)
            self.files.append(path.read_bytes())
        path = folder / "opt-plain.flash"
        calibrate(path, ids, tokens=600, steps=2, layout="coactivation")
        self.files.append(path.read_bytes())

    def changed(self, random):
        raw = self.files[random.integers(len(self.files))]
        length = int.from_bytes(raw[:8], "little")
        header, data = raw[8 : 8 + length], bytearray(raw[8 + length :])
        kind = random.random()
        if kind < 0.7:
            value = json.loads(header)
            for _ in range(random.integers(1, 4)):
                name = "__metadata__" if random.random() < 0.6 and isinstance(value, dict) else None
                if name in (value if isinstance(value, dict) else ()):
                    value[name] = changed(value[name], random)
                else:
                    value = changed(value, random)
            header = as_text(value).encode("utf-8", "surrogatepass")
            header = header.ljust(-(-(len(header) + 8) // 4096) * 4096 - 8)
        elif kind < 0.8:
            header = spoilt(bytearray(header), random)
        if kind >= 0.8 or random.random() < 0.1:  # weights of any bits, infinite ones among them
            for _ in range(random.integers(1, 4)):
                at = int(random.integers(len(data)))
                pattern = [b"\xff", b"\x7f", b"\x80\x7f\0\0", random.bytes(4)][random.integers(4)]
                data[at : at + 4096] = (pattern * 4096)[: len(data[at : at + 4096])]
        whole = len(header).to_bytes(8, "little") + header + data
        return cut(whole, random) if random.random() < 0.1 else whole

    def use(self, path):
        opened = check("inspect", path, "--memory", "400M") == 0
        check("inspect", path, "--memory", "400M", "--json", "-")
        check("verify", path)
        for more in (["--temp", "0"], ["--seed", "1", "--neurons", "dense", "-c", "8"]):
            check("run", path, "--tokens", "5,6", "-n", "2", "--memory", "400M", *more)
        check("plan", path, "--memory", "400M", "--device", "rpi5-sd")
        return opened


class Companions(Bundles):
    """A bundle that has its weights in a GGUF file beside it, which says where."""

    def __init__(self, folder):
        from gguf import GGMLQuantizationType

        from make_gguf import random_olmoe, write_gguf

        def kind(name, values):
            return None if "inp" in name else GGMLQuantizationType.Q4_0

        path = write_gguf(random_olmoe(folder / "hf"), folder / "x.gguf", kind)
        convert(path, folder / "x.flash", in_place=True)
        self.files = [(folder / "x.flash").read_bytes()]

    def changed(self, random):
        whole = super().changed(random)
        if random.random() < 0.4:
            return whole
        raw = self.files[0]
        length = int.from_bytes(raw[:8], "little")
        value = json.loads(raw[8 : 8 + length])
        at = value["__metadata__"]
        at["flashinfer.in_place"] = changed(at["flashinfer.in_place"], random)
        header = as_text(value).encode("utf-8", "surrogatepass")
        header = header.ljust(-(-(len(header) + 8) // 4096) * 4096 - 8)
        return len(header).to_bytes(8, "little") + header + raw[8 + length :]


class Ggufs:
    """GGUF files of a dense model and a mixture, with vocabularies."""

    def __init__(self, folder):
        from make_gguf import write_gguf

        self.folder, self.files = folder, []
        for name in ("llama-silu", "olmoe", "phi3"):
            path = folder / f"{name}.gguf"
            write_gguf(DATA / name, path, metadata=self._vocabulary)
            raw = path.read_bytes()
            with GgufFile(path) as file:
                self.files.append((raw, file.at))

    @staticmethod
    def _vocabulary(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{i}" for i in range(96)])
        writer.add_token_types([1] * 96)
        writer.add_token_merges(["t 1", "t 2"])

    def changed(self, random):
        raw, header = self.files[random.integers(len(self.files))]
        begun = spoilt(bytearray(raw[:header]), random)
        whole = begun + raw[header:]
        return cut(whole, random) if random.random() < 0.15 else whole

    def use(self, path):
        bundle = path.with_suffix(".flash")
        made = check("convert", path, bundle, "--dtype", "f32") == 0
        assert made == bundle.exists(), "a conversion that failed left a file"
        if made:
            assert check("verify", bundle) == 0
            check("run", bundle, "--tokens", "5,6", "-n", "2", "--memory", "400M")
            bundle.unlink()
        return made


class Profiles:
    """A machine's profile."""

    def __init__(self, folder):
        self.folder, self.bundle = folder, folder / "opt.flash"
        convert(DATA / "opt-plain", self.bundle, "f32")
        self.profiles = [json.loads(path.read_text()) for path in profile.boards().values()]

    def changed(self, random):
        value = self.profiles[random.integers(len(self.profiles))]
        for _ in range(random.integers(1, 4)):
            value = changed(value, random)
        raw = as_text(value).encode()
        return spoilt(bytearray(raw), random) if random.random() < 0.2 else raw

    def use(self, path):
        opened = check("plan", self.bundle, "--memory", "400M", "--device", path) == 0
        check("plan", self.bundle, "--memory", "400M", "--device", path, "--json", "-")
        check("run", self.bundle, "--tokens", "5", "-n", "1", "--memory", "400M", "--device", path)
        return opened


def spoilt(raw, random):
    """Some bytes changed, as numbers of 1, 4 and 8 bytes, or put in or left out."""
    for _ in range(random.integers(1, 4)):
        at, width = int(random.integers(len(raw) or 1)), int(random.choice([1, 4, 8]))
        value = bytes([int(random.choice([0, 1, 2, 0x7F, 0xFF, random.integers(256)]))]) * width
        kind = random.random()
        raw[at : at + (0 if kind < 0.1 else width)] = b"" if kind > 0.9 else value
    return bytes(raw)


def cut(raw, random):
    return raw[: random.integers(len(raw) or 1)]


KINDS = {"bundle": Bundles, "companion": Companions, "gguf": Ggufs, "profile": Profiles}


def fuzz(kind, count, seed=0, folder=None):
    """Use ``count`` changed files; return how many were usable all the same.

    Raises AssertionError naming the case (--seed S --count 1 repeats it), whose file is kept.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files, usable = KINDS[kind](Path(scratch)), 0
        path = Path(scratch) / ("x.gguf" if kind == "gguf" else "x.bin")
        for case in range(seed, seed + count):
            path.write_bytes(files.changed(np.random.default_rng([case])))
            signal.alarm(SECONDS)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    usable += files.use(path)
            except BaseException as error:
                kept = Path(folder or tempfile.gettempdir()) / f"case-{kind}-{case}"
                kept.write_bytes(path.read_bytes())
                raise AssertionError(f"{kind} {case}: {error!r}; its file is {kept}") from error
            finally:
                signal.alarm(0)
    return usable


def limit_memory():
    """Let this process take no more address space than it has, and SPARE_BYTES."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _too_long(*_):
    raise AssertionError(f"took more than {SECONDS} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_long)
    os.environ["XDG_CACHE_HOME"] = os.devnull
    limit_memory()
    usable = fuzz(args.kind, args.count, args.seed)
    peak = peak_rss() >> 20
    print(f"{args.kind}: {args.count} cases clean, {usable} usable, {peak} MiB at most")
    sys.exit(0)
