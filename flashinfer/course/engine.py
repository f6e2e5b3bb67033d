"""The engine that answers run in: the demo model, in less memory than it has, on one text."""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flashinfer.paper.feedforward
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.progress import no_progress
from flashinfer.model import Model
from flashinfer.paper.prefetch import NoPrefetch, Prefetch
from flashinfer.plan.options import Options
from flashinfer.plan.setup import prepare
from flashinfer.study.expected import BASE
from flashinfer.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "data" / "demo.flash"
TOKENS = 128  # of the text
# The plan counts from BASE, whatever this process takes: the same slots on every machine.
ROOM = 24 << 20  # of which the neuron caches get enough for a third of the neurons
DEVICE = "rpi5-nvme"  # its profile decides what the plan chooses
CONTEXT = 256


class Run(NamedTuple):
    """What processing the text, one token after the other, gave and took.

    digest  of the bits of all logits
    reads, nbytes  of units, a token
    """

    digest: str
    reads: float
    nbytes: float


def text(first: int = 0, tokens: int = TOKENS) -> list[int]:
    """The token ids of the text: of the page on which the method stands."""
    with Bundle(DEMO) as bundle:
        tokenizer = Tokenizer(bundle, None)
    try:
        source = inspect.getsource(flashinfer.paper.feedforward)
        return tokenizer.encode(source)[first : first + tokens]
    finally:
        tokenizer.close()


def opened(path: Path = DEMO, prefetch: bool = False, **options: Any) -> Model:
    """A model with ROOM bytes beyond those that this process takes before.

    prefetch  neurons may be read before their layer's turn
    options   those of ``Options``
    """
    usual = {"memory": BASE + ROOM, "context": CONTEXT, "device": DEVICE, "draft": "off"}
    wanted = Options(**{**usual, **options})
    bundle = Bundle(path)
    try:
        setup = prepare(bundle, wanted, BASE)
    except BaseException:
        bundle.close()
        raise
    model = Model(bundle, setup, no_progress)
    for layer in model.layers:
        layer.feed_forward.prefetch = Prefetch() if prefetch else NoPrefetch()
    return model


def run(
    model: Model, ids: list[int], progress: Callable[[float], None] = lambda share: None
) -> Run:
    """Process the text with a model that was just opened."""
    flash, digest = model.flash, hashlib.sha256()
    reads, nbytes = flash.reads, flash.bytes_read - flash.bytes_streamed
    for number, token in enumerate(ids):
        digest.update(model.forward([token]).tobytes())
        progress((number + 1) / len(ids))
    return Run(
        digest.hexdigest()[:16],
        (flash.reads - reads) / len(ids),
        (flash.bytes_read - flash.bytes_streamed - nbytes) / len(ids),
    )
