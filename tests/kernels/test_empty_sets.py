"""No neuron predicted, no token in the resident rows: empty sets pass each way of a layer."""

import numpy as np
import pytest

from conftest import DATA, keep_rows
from flashinfer import Model
from flashinfer.calibration.calibrate import calibrate
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import convert
from flashinfer.formats.number_formats import FORMATS
from flashinfer.paper.flash import Flash, aligned_bytes
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import opt_config
from flashinfer.transformer.weights import PartlyStreamed, Resident, Streamed

IDS = np.random.default_rng(2).integers(3, 96, 30)


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A mixture of experts with a ReLU, and predictors within its experts."""
    folder = tmp_path_factory.mktemp("routed")
    convert(DATA / "mixtral-relu", folder / "plain.flash", "f32")
    ids = np.random.default_rng(5).integers(3, 96, 600)
    calibrate(folder / "plain.flash", ids, folder / "x.flash", tokens=600, steps=0)
    return folder / "x.flash"


@pytest.mark.parametrize("kind", ["calibrated", "routed"])
@pytest.mark.parametrize("seed", range(8))
def test_layers_without_a_neuron(kind, seed, twin, request):
    """Of some layers few neurons are predicted, or none: a prompt, in pieces, through a large cache
    and a small one, and token by token, gives the same bits."""
    random = np.random.default_rng(seed)
    path = request.getfixturevalue(kind)
    silent, found = random.random(8), []
    for rows, pieces in (
        (None, (30,)),
        (None, (7, 23)),
        (40, (30,)),
        (3, (1, 29)),
        (40, (1,) * 30),
    ):
        with Model.open(path) as model:
            for share, layer in zip(silent, model.layers, strict=False):
                # Of a layer in three nothing is predicted, of another one neuron in twenty.
                bias = layer.feed_forward.predictor.bias
                bias[:] = np.where(np.arange(len(bias)) % 20 == 7, bias, -1e9)
                bias[:] = -1e9 if share < 0.4 else bias
                if rows:
                    keep_rows(layer.feed_forward, rows, None)
            parts, begin = [], 0
            for piece in pieces:
                parts.append(model.forward(IDS[begin : begin + piece], every=True))
                begin += piece
            found.append(np.concatenate(parts))
    assert np.isfinite(found[0]).all()
    assert all(np.array_equal(found[0], other) for other in found)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_wherever_they_are(name, tmp_path):
    """Rows of a matrix in DRAM, on flash, or partly there: any of them, and none."""
    path = tmp_path / "x.flash"
    width = max(64, FORMATS[name].block)
    synthesize(path, opt_config(width, 1, 1, width, vocab_size=400, positions=16), name)
    random = np.random.default_rng(1)
    with Bundle(path) as bundle:
        tensor, flash = bundle.tensors["embed_tokens.weight"], Flash(path)
        raw = bundle.file.read_bytes(tensor.offset, tensor.nbytes)
        data = raw.reshape(tensor.rows, tensor.row_bytes)
        buffer = aligned_bytes(64 << 10)
        whole = Resident(tensor, data)
        others = [PartlyStreamed(tensor, data[:n], flash, buffer) for n in (1, 150, 399)]
        for matrix in (Streamed(tensor, flash, buffer), *others):
            for low, high in ((0, 400), (0, 1), (0, 150), (399, 400), (150, 400)):
                for n in (0, 1, 9):
                    ids = random.integers(low, high, n)
                    assert np.array_equal(matrix.rows(ids), whole.rows(ids))
            for n in (0, 1, 5):
                x = random.standard_normal((n, width)).astype(np.float32)
                assert np.array_equal(matrix.linear(x), whole.linear(x))
        flash.close()


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_a_tied_head_partly_in_dram(dtype, tmp_path, cli):
    """Tokens that all lie in the streamed part of a head that is the embedding matrix, too."""
    path = tmp_path / "x.flash"
    synthesize(path, opt_config(256, 5, 4, 1500, vocab_size=3000, positions=256), dtype)
    with Model.open(path) as model:
        whole = model.logits([2999, 2998])
    for kept in (1, 40, 2900):
        with Model.open(path) as model:
            tensor = model.bundle.tensors["embed_tokens.weight"]
            data = model.decoder.head.matrix.data[:kept]
            model.decoder.head = PartlyStreamed(tensor, data, model.flash, aligned_bytes(1 << 20))
            model.decoder.embed_tokens = model.decoder.head
            assert np.array_equal(model.logits([2999, 2998]), whole)
