"""Layers with a state: whatever way a text takes through them, a token has the same bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import CONTEXT, drafted, share_passes, taken_back_anywhere

from flashinfer import Model
from flashinfer.formats.convert import convert
from flashinfer.oracle.kits.configs import CONFIGS
from flashinfer.oracle.kits.kit import write_kit
from flashinfer.transformer.state import RecurrentState

NAMES = (
    "lfm2-bias", "lfm2-moe", "qwen3-next", "qwen3-5", "granite-hybrid", "granite-hybrid-dense",
    "nemotron-h", "nemotron-h-moe",
)  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 96, 44).tolist()


@pytest.fixture(scope="module", params=NAMES)
def path(tmp_path_factory, request):
    """A bundle of a small model whose layers have states."""
    folder = tmp_path_factory.mktemp("state")
    write_kit(folder / "kit", [CONFIGS[request.param]["model_type"]])
    convert(folder / "kit/models" / request.param, folder / "x.flash", "f32")
    return folder / "x.flash"


@pytest.fixture(scope="module")
def expected(path):
    """The logits of IDS (T, vocab_size)."""
    with Model.open(path, context=CONTEXT, draft="off") as model:
        return model.logits(IDS)


@pytest.mark.parametrize("draft", ["off", "ngram"])
def test_however_many_tokens_a_pass_takes(path, expected, draft, twin):
    with Model.open(path, context=CONTEXT, draft=draft) as model:
        whole = model.logits(IDS)
        for sizes in ([1] * 44, [2] * 22, [3, 40, 1], [30, 2, 2, 1, 9], [43, 1]):
            model.reset()
            done, rows = 0, []
            for n in sizes:
                rows.append(model.forward(IDS[done : done + n], every=True))
                done += n
            assert np.array_equal(np.concatenate(rows), whole)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tokens_are_taken_back_anywhere(path, expected, data):
    """As many as may be drafted without computing them again, and all others by doing that."""
    taken_back_anywhere(path, IDS, expected, data)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_drafts_change_no_token(path, share):
    states = [c for c in drafted(path, IDS, share) if isinstance(c, RecurrentState)]
    assert states and all(state.room for state in states)


def test_texts_that_share_passes(path):
    share_passes(path, IDS)


@pytest.mark.parametrize("draft", ["off", "ngram"])
def test_a_session_goes_on(path, expected, draft, tmp_path):
    session = tmp_path / "x.session"
    with Model.open(path, context=CONTEXT, draft=draft) as model:
        model.forward(IDS[:11])
        model.forward(IDS[11:15])  # some of which wait, where tokens may be drafted
        model.save_session(session)
    for other in ("off", "ngram"):
        with Model.open(path, context=CONTEXT, draft=other) as model:
            loaded = model.load_session(session)
            assert loaded.token_ids == IDS[:15]
            at = model.position
            assert at >= 11
            assert np.array_equal(model.forward(IDS[at:], every=True), expected[at:])


def test_an_interrupt_anywhere_leaves_nothing_half_done(path, expected, monkeypatch):
    advance = RecurrentState.advance
    with Model.open(path, context=CONTEXT, draft="ngram") as model:
        for fails in range(1, 9):
            calls = 0

            def failing(self, inputs, start, step, fails=fails):
                nonlocal calls
                calls += 1

                def broken(window, state):
                    y = step(window, state)
                    if calls == fails:
                        raise KeyboardInterrupt
                    return y

                return advance(self, inputs, start, broken)

            model.reset()
            model.forward(IDS[:7])
            with monkeypatch.context() as patch:
                patch.setattr(RecurrentState, "advance", failing)
                with pytest.raises(KeyboardInterrupt):
                    for first in range(7, 44, 2):
                        model.forward(IDS[first : first + 2])
            at = model.position
            assert np.array_equal(model.forward(IDS[at:], every=True), expected[at:])
