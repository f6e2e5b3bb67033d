"""A few of the cases of fuzz_text.py; thousands by that script."""

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from fuzz_text import FUZZERS, run

from flashinfer.text import worker


@pytest.mark.parametrize("kind", FUZZERS)
def test_hostile_texts_end_in_a_result_or_one_line(kind, monkeypatch):
    monkeypatch.setattr(worker, "SECONDS", 2)
    results = [run(kind, seed) for seed in range(25)]
    refused = set(results) - {"accepted"}
    assert "accepted" in results and len(refused) > 1
