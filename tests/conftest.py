"""Small models that many tests use, made once a run."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from flashinfer import Model, kernels
from flashinfer.calibration.calibrate import calibrate
from flashinfer.cli.main import main
from flashinfer.formats.convert import convert
from flashinfer.paper.neuron_cache import NeuronCache
from flashinfer.plan import memory
from flashinfer.probe import measuring, probing
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import opt_config

# The same examples at each run; ``pytest --hypothesis-profile explore`` looks for others.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeatable")

DATA = Path(__file__).parent / "data"
ENCODER_DATA = Path(__file__).parent / "encoders"
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def no_profile_of_this_machine(tmp_path_factory):
    """Tests know nothing of what ``flashinfer probe`` found here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cli(capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(*args):
        try:
            code = main(list(map(str, args)))
        except SystemExit as exit:  # argparse
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(params=list(kernels.TWINS))
def twin(request):
    """Every test of a hot path runs with the NumPy kernels and with the compiled ones."""
    before = kernels.in_use
    kernels.use(request.param)
    yield request.param
    kernels.use(before)


@pytest.fixture
def constant_rss(monkeypatch):
    """The least budget for a model stays the same, though the tests' own process grows."""
    monkeypatch.setattr(memory, "rss", lambda: 60 << 20)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a small checkpoint that a test may spoil."""

    def copy(name="opt-plain"):
        folder = tmp_path / name
        found = DATA if (DATA / name).exists() else ENCODER_DATA
        shutil.copytree(found / name, folder)
        return folder

    return copy


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A bundle of the checkpoint opt-plain in f32, without predictors."""
    path = tmp_path_factory.mktemp("plain") / "plain.flash"
    convert(DATA / "opt-plain", path, "f32")
    return path


@pytest.fixture(scope="session")
def calibrated(plain, tmp_path_factory):
    """The same with predictors; random weights make poor ones, which is as good for tests."""
    path = tmp_path_factory.mktemp("calibrated") / "calibrated.flash"
    ids = np.random.default_rng(5).integers(3, 96, 1200)
    calibrate(plain, ids, path, text="random", tokens=1200, steps=20)
    return path


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """A synthetic bundle whose parts are some MB, so that a budget can leave them out."""
    path = tmp_path_factory.mktemp("synthetic") / "synthetic.flash"
    config = opt_config(256, 4, 4, 1024, vocab_size=4000, positions=256)
    synthesize(path, config, "f16")
    return path


@pytest.fixture
def quick_probe(monkeypatch):
    """``flashinfer probe`` with so little to measure that it takes a second."""
    for name, value in {
        "FILE_BYTES": 16 << 20, "LEAST_FILE_BYTES": 1 << 20, "READ_SECONDS": 0.01,
        "MEANWHILE_BYTES": 1 << 20, "BATCH_BYTES": 1 << 20, "BATCH_READS": 16,
        "WEIGHT_BYTES": 1 << 20, "MATRIX_BYTES": 1 << 18, "SHAPE": (64, 2, 2, 128),
    }.items():  # fmt: skip
        monkeypatch.setattr(measuring if hasattr(measuring, name) else probing, name, value)


def logits_of(path, ids, rows=None, **options):
    """Logits of a prompt, then of its tokens one by one: (T, vocab), (T, vocab); ``rows``: as many
    in each layer's cache."""
    with Model.open(path, **options) as model:
        for layer in model.layers if rows else ():
            keep_rows(layer.feed_forward, rows, options.get("window"))
        whole = model.logits(ids)
        model.reset()
        single = np.stack([model.forward([token]) for token in ids])
    return whole, single


def keep_rows(ffn, n, window):
    """Give a layer's cache n rows, and nothing in them."""
    old = ffn.store.cache
    ffn.whole.offsets = None
    n = min(n, old.capacity)  # behind its slots lie those of other layers
    own = slice(old.starts[0], old.starts[0] + n * old.slot_bytes)
    ffn.store.cache = NeuronCache(len(old.slot_of), old.memory, old.slot_bytes, "lru", window, own)
