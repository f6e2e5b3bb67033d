"""Perplexity: by hand, from the model's own logits; and the command."""

import json

import numpy as np
import pytest

from flashinfer import Model, UserError
from flashinfer.study.perplexity import evaluate


def by_hand(model, ids):
    nats = []
    for start in range(0, len(ids), 48):
        part = ids[start : start + 48]
        logits = model.logits(part).astype(float)
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        nats += [-np.log(chances[t, part[t + 1]]) for t in range(len(part) - 1)]
    return np.mean(nats), len(nats)


@pytest.mark.parametrize("neurons", ["dense", "predicted"])
def test_as_by_hand(calibrated, neurons):
    ids = np.random.default_rng(2).integers(3, 96, 130)
    seen = []
    with Model.open(calibrated, neurons=neurons) as model:
        nats, count = evaluate(model, ids, lambda *done: seen.append(done))
        expected = by_hand(model, ids)
    assert (nats, count) == pytest.approx(expected)
    assert count == 130 - 3 and seen[-1] == ("evaluate", count, count)


def test_too_short(calibrated):
    with Model.open(calibrated) as model, pytest.raises(UserError, match="at least 2 tokens"):
        evaluate(model, [5])


def test_the_command_on_the_demo_model(cli, tmp_path):
    pytest.importorskip("tokenizers")
    from flashinfer.cli.run import demo_model

    text, found = tmp_path / "text.py", {}
    text.write_text("import os\n\n\ndef main():\n    return os.getcwd()\n" * 20)
    for neurons in ("dense", "predicted"):
        code, out, _ = cli(
            "evaluate", demo_model(), "--text", text, "--neurons", neurons, "--tokens", "200",
            "--json", tmp_path / "x.json",
        )  # fmt: skip
        found[neurons] = json.loads((tmp_path / "x.json").read_text())
        assert code == 0 and out.startswith(f"{neurons}: perplexity")
    assert found["dense"]["perplexity"] < 100  # it was trained on Python
    assert found["predicted"]["perplexity"] == pytest.approx(found["dense"]["perplexity"], rel=0.1)
