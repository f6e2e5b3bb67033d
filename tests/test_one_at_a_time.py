"""A Model serves one thread and one text at a time: the second caller gets an error, no crash."""

import threading

import numpy as np
import pytest

from flashinfer import Model, UserError

IDS = list(range(3, 23))


def test_several_threads_on_one_model(synthetic):
    """Each call either gives the right logits or says that the model is in use."""
    with Model.open(synthetic) as model:
        expected, outcomes = model.logits(IDS), []

        def work():
            for _ in range(20):
                try:
                    outcomes.append(np.array_equal(model.logits(IDS), expected))
                except UserError as error:
                    assert "in use by another thread" in str(error)
                    outcomes.append(None)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 80 and False not in outcomes and True in outcomes
        assert np.array_equal(model.logits(IDS), expected)


def test_a_thread_that_waits_for_another_is_told(synthetic):
    with Model.open(synthetic) as model:
        inside, done, caught = threading.Event(), threading.Event(), []

        def progress(what, share, total):
            inside.set()
            done.wait(10)

        model.progress = progress
        worker = threading.Thread(target=model.logits, args=(IDS,))
        worker.start()
        inside.wait(10)
        for call in (lambda: model.logits(IDS), lambda: model.forward([3]), model.reset,
                     lambda: next(model.generate(IDS, 2))):  # fmt: skip
            with pytest.raises(UserError, match="in use by another thread") as error:
                call()
            caught.append(error)
        done.set()
        worker.join()
        assert len(caught) == 4 and len(model.logits(IDS)) == len(IDS)


@pytest.mark.parametrize("meanwhile", ["generate", "logits", "forward", "reset"])
def test_a_text_that_another_replaced_cannot_go_on(meanwhile, synthetic):
    with Model.open(synthetic) as model:
        calls = {
            "generate": lambda: next(model.generate([5, 6], 4, temperature=0)),
            "logits": lambda: model.logits([5, 6]),
            "forward": lambda: model.forward([7]),
            "reset": model.reset,
        }
        first = model.generate(IDS, 8, temperature=0)
        next(first)
        calls[meanwhile]()
        with pytest.raises(UserError, match="another text was begun"):
            next(first)
        alone = list(model.generate(IDS, 8, temperature=0))
        assert alone == list(model.generate(IDS, 8, temperature=0))


def test_a_closed_model_says_so(synthetic):
    model = Model.open(synthetic)
    tokens = model.generate(IDS, 4, temperature=0)
    next(tokens)
    model.close()
    model.close()
    for call in (lambda: model.logits(IDS), lambda: model.forward([3]), model.reset,
                 lambda: next(tokens), lambda: list(model.generate(IDS, 2))):  # fmt: skip
        with pytest.raises(UserError, match="the model is closed"):
            call()


def test_as_many_tokens_are_kept_as_there_are(synthetic):
    with Model.open(synthetic) as model:
        model.logits(IDS)
        for kept in (-1, len(IDS) + 1):
            with pytest.raises(UserError, match="cannot be kept"):
                model.reset(kept)
        assert model.position == len(IDS)
        model.reset(3)
        assert model.position == 3


@pytest.mark.parametrize("call", ["forward", "logits", "generate", "reset", "close"])
def test_what_a_model_calls_meanwhile_cannot_use_it(call, synthetic):
    with Model.open(synthetic) as model:
        expected = model.logits(IDS)
        calls = {
            "forward": lambda: model.forward([3]), "logits": lambda: model.logits([3]),
            "generate": lambda: next(model.generate([3], 1)), "reset": model.reset,
            "close": model.close,
        }  # fmt: skip
        model.progress = lambda what, done, total: calls[call]()
        with pytest.raises(UserError, match="the model is computing"):
            model.logits(IDS)
        model.progress = lambda what, done, total: None
        assert np.array_equal(model.logits(IDS), expected)
