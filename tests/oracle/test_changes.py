"""One element of a sound trace is changed: by much it is found there, by little it is not."""

import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from hostile import IDS, traced, write

from conftest import DATA
from flashinfer.oracle.arithmetic import KNOWN
from flashinfer.oracle.compare import compare
from flashinfer.oracle.known import F32
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.oracle.replacement import first_difference
from flashinfer.oracle.replay import Replay
from flashinfer.oracle.report import junit, page
from flashinfer.oracle.trace_file import Trace, write_trace
from flashinfer.transformer.values import values_of

HOW = KNOWN["float32"]
MUCH, LITTLE = 50, 0.5  # units of noise
HOSTILE = "<script>&amp;\"'</title>]]>\x00\x1b[31m\ud800\u202e\nengine"


@pytest.mark.parametrize(
    "name", ["opt-plain", "llama-silu", "gemma2", "phi", "qwen2-moe", "gpt-oss", "falcon-rw-alibi"]
)
def test_much_is_found_at_the_operation_and_little_nowhere(name, tmp_path):
    random, path = np.random.default_rng(11), tmp_path / "t.safetensors"
    with ModelWeights(DATA / name) as weights:
        values = values_of(weights.config, weights.naming)
        for guilty in [None, *(v for v in values if v.dtype == "F32")]:
            at = noisy_engine(weights, random, guilty, path)
            with Trace(path) as trace:
                found = compare(weights, trace, HOW)
            wrong = [o for o in found.operations if o.verdict == "wrong"]
            if guilty is None:
                assert wrong == [] and found.judged > 20
            else:
                assert [o.name for o in wrong] == [guilty.name]
                assert (wrong[0].position, *wrong[0].index) == at


def noisy_engine(weights, random, guilty, path):
    """Write the trace of an engine whose every operation is LITTLE units of noise off, and in one
    element of the value ``guilty`` MUCH, and which goes on from there; returns that element."""
    recorded, where = {}, ()
    run = Replay(weights, recorded, np.array(IDS), np.arange(len(IDS)), HOW)
    written = []
    for value in values_of(weights.config, weights.naming):
        place = value.layer, value.key
        if value.key == "choices":
            recorded[place] = run.choice(value.layer).experts.astype(np.int32)
        elif value.dtype == "F32":
            expected = run.compute(*place)
            # What is copied has no noise but the rounding of float32.
            unit = np.maximum(expected.spread, F32 * np.maximum(abs(expected.value), 2.0**-126))
            off = random.uniform(-LITTLE, LITTLE, unit.shape)
            if value == guilty:
                where = tuple(int(random.integers(n)) for n in unit.shape)
                off[where] = MUCH
            recorded[place] = (expected.value + off * unit).astype(np.float32)
        else:
            continue
        written.append(value)
    arrays = {value.name: recorded[value.layer, value.key] for value in written}
    write_trace(path, written, arrays, "noisy", weights.hf_config, IDS)
    return where


def test_the_first_difference_is_that_of_the_bytes(tmp_path):
    sound, other = traced("qwen3", tmp_path), tmp_path / "other.safetensors"
    random, names = np.random.default_rng(3), json.loads(sound.metadata["flashinfer.order"])
    for n_changed in (0, 1, 2, 5):
        arrays = {name: array.copy() for name, array in sound.arrays.items()}
        for name in random.choice(names, n_changed, replace=False):
            flat = arrays[name].reshape(-1).view(np.uint8)
            flat[random.integers(len(flat))] ^= 1 << random.integers(8)
        write(other, sound.metadata, arrays)
        expected = [n for n in names if arrays[n].tobytes() != sound.arrays[n].tobytes()]
        assert len(expected) == n_changed
        with Trace(sound.path) as one, Trace(other) as two:
            found = first_difference(one, two)
        assert found == ((expected[0], n_changed) if expected else None)


# ---------------------------------------------------------------------- reports


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory):
    """Of a sound and of a wrong trace, by an engine with a hostile name."""
    folder = tmp_path_factory.mktemp("reports")
    sound, file = traced("llama-silu", folder), folder / "other.safetensors"
    spoiled = np.full_like(sound.arrays["logits"], np.nan)
    found = []
    for arrays in (sound.arrays, {**sound.arrays, "logits": spoiled}):
        write(file, {**sound.metadata, "flashinfer.engine": HOSTILE}, arrays)
        with ModelWeights(sound.model) as weights, Trace(file) as trace:
            found.append(compare(weights, trace, HOW))
    return found


def test_junit_is_well_formed(comparisons):
    for found in comparisons:
        suite = ElementTree.fromstring(junit(found))
        assert suite.get("name") == found.engine and "script" in found.engine
        assert len(suite) == len(found.operations) == int(suite.get("tests"))
        failed = [case.get("name") for case in suite if case.find("failure") is not None]
        assert failed == [o.name for o in found.operations if o.verdict == "wrong"]


class Balanced(HTMLParser):
    """Fails where an end tag is not that of the innermost open element."""

    ENDLESS, CELLS = ("meta", "br"), ("td", "th")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        if tag in self.CELLS and self.open[-1] in self.CELLS:
            self.open.pop()  # a cell ends where the next one begins
        self.seen.add(tag)
        if tag not in self.ENDLESS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag == "tr" and self.open[-1] in self.CELLS:
            self.open.pop()
        assert self.open.pop() == tag


def test_html_is_balanced_and_escaped(comparisons):
    for found in comparisons:
        parser = Balanced()
        parser.feed(page(found))
        parser.close()
        assert parser.open == [] and "script" not in parser.seen and "table" in parser.seen
        page(found).encode()


def test_what_is_printed_holds_no_control_characters(comparisons):
    for found in comparisons:
        assert found.engine.isprintable() and found.engine.endswith("engine")
