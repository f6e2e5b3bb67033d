"""Every architecture and number format of the kit: nothing but the file and the tokens changes a
logit."""

from pathlib import Path

import numpy as np
import pytest

from conftest import logits_of
from flashinfer import BudgetError, Model, kernels
from flashinfer.formats.convert import convert
from flashinfer.oracle.kits.configs import MODELS
from flashinfer.oracle.kits.kit import goldens_of, write_kit

pytestmark = pytest.mark.skipif(kernels.in_use != "native", reason="no compiled kernels")


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """Tiny models of every architecture, as checkpoints and as GGUF files."""
    folder = tmp_path_factory.mktemp("every") / "kit"
    write_kit(folder)
    return folder


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_token_has_the_same_bits_by_itself_and_in_any_budget(model, kit, tmp_path, constant_rss):
    """Converted to f32, and GGUF files with the number formats that they have."""
    ids = np.random.default_rng(3).integers(3, 96, 40)
    for golden in goldens_of(model):
        path = tmp_path / f"{Path(golden.source).name}.flash"
        convert(kit / golden.source, path, None if golden.source.endswith(".gguf") else "f32")
        with pytest.raises(BudgetError) as caught:
            Model.open(path, memory=1, context=40)
        whole, single = logits_of(path, ids, context=40)
        assert np.isfinite(whole).all() and np.array_equal(whole, single), golden.source
        found = logits_of(path, ids, context=40, memory=caught.value.least)
        assert all(np.array_equal(whole, other) for other in found), golden.source
