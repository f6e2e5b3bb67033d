"""What ``watch`` and ``run --record`` share: a run is recorded, and written as a page."""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flashinfer.formats.errors import UserError
from flashinfer.formats.files import replacing
from flashinfer.formats.progress import Progress
from flashinfer.model import Model
from flashinfer.plan import profile
from flashinfer.plan.profile import Profile
from flashinfer.probe.probing import probe
from flashinfer.study.watch.page import Recorded, page
from flashinfer.study.watch.recorder import Recorder
from flashinfer.text.tokenizer import TextStream, Tokenizer


def measured_device(args: Namespace, path: Path, progress: Progress) -> Profile:
    """The profile of the device that ``path`` lies on; one that nobody measured is measured now."""
    known = profile.find(args.device, path)
    if known is None:
        print("flashinfer: this device has not been measured; doing so", file=sys.stderr)
        known = probe(path.parent, args.threads, args.io, progress)
    return known


@contextmanager
def recorded(
    model: Model,
    target: str | None,
    ids: Sequence[int],
    tokenizer: Tokenizer | None,
    device: Profile | None,
    progress: Progress,
) -> Iterator[Recorder | None]:
    """Record what the model does in the block, and write the page to ``target``; None: nothing.

    ids  of the prompt; device: what the page plans with
    Raises UserError where no token was processed by itself.
    """
    if target is None or device is None:
        yield None
        return
    with Recorder(model).attached() as recorder:
        yield recorder
    runs = recorder.finished()
    if not runs:
        raise UserError(f"{target}: nothing to record; at least two tokens must be written")
    tokens = model.stats.token_ids
    prompt, *pieces = pieces_of(tokenizer, [ids, *([token] for token in tokens)])
    made = (
        f"{model.bundle.path.name}, {time.strftime('%Y-%m-%d')}, a budget of "
        f"{model.plan.budget / 2**20:,.0f} MiB; measured on this machine, planned for {device.name}"
    )
    found = Recorded("A run, token by token", made, prompt, pieces[: len(runs)], runs,
                     recorder.initial)  # fmt: skip
    text = page(model, found, device, progress)
    with replacing(target) as file:
        file.write(text.encode())


def pieces_of(tokenizer: Tokenizer | None, parts: Sequence[Sequence[int]]) -> list[str]:
    """The text that each part adds to those before it; without a tokenizer its ids."""
    if tokenizer is None:
        return [" ".join(map(str, part)) + " " for part in parts]
    stream = TextStream(tokenizer)
    return ["".join([stream.add(token) for token in part]) for part in parts]
