"""Configs from files that nobody vouches for: a ModelConfig, or one line."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA
from flashinfer.formats.architectures import ARCHITECTURES, model_config
from flashinfer.formats.errors import FormatError
from flashinfer.positions import RotaryPositions, alibi_table

CONFIGS = {path.parent.name: json.loads(path.read_text()) for path in DATA.glob("*/config.json")}
STRANGE = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 3, 7, 1e-300, 1e300, 2**40, "", "relu", "yarn", [], [1], {}]
)


def test_every_architecture_has_a_checkpoint_here():
    kinds = {config["model_type"] for config in CONFIGS.values()}
    assert kinds == ARCHITECTURES.keys() - {"turbosparsemistral", "ministral"}


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(sorted(CONFIGS)), data=st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_strange_values_are_used_or_refused(name, data):
    config = json.loads(json.dumps(CONFIGS[name]))
    keys = sorted(config)
    for _ in range(data.draw(st.integers(1, 3))):
        place = config
        rope = config.get("rope_parameters")
        if isinstance(rope, dict) and data.draw(st.booleans()):
            place, keys = rope, sorted({*rope, "factor", "beta_fast", "mscale", "truncate"})
        place[data.draw(st.sampled_from(keys))] = data.draw(STRANGE)
        keys = sorted(config)
    try:
        found = model_config(config)
    except FormatError as error:
        assert "\n" not in str(error) and str(error).startswith("config: ")
        return
    if found.rotary and found.head_dim < 1 << 12:
        cos, sin = RotaryPositions(found.rotary, 64)(3, 5)
        assert cos.shape == sin.shape == (5, found.rotary.dim // 2)
    if found.positions == "alibi" and found.num_attention_heads < 1 << 12:
        assert np.isfinite(alibi_table(found.num_attention_heads, found.head_dim, 8)).all()
