"""What ``watch`` and ``run --record`` share: a run is recorded, and written as a page."""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashinfer.formats.errors import UserError
from flashinfer.formats.files import replacing
from flashinfer.formats.progress import Progress
from flashinfer.model import Model
from flashinfer.plan import profile
from flashinfer.plan.profile import Profile
from flashinfer.probe.probing import probe
from flashinfer.study.watch.page import Recorded, measured, own_setting, page
from flashinfer.study.watch.recorder import Recorder
from flashinfer.study.watch.replay import Replay
from flashinfer.text.tokenizer import TextStream, Tokenizer


def measured_device(args: Namespace, path: Path, progress: Progress) -> Profile:
    """The profile of the device that ``path`` lies on; one that nobody measured is measured now."""
    known = profile.find(args.device, path)
    if known is None:
        print("flashinfer: this device has not been measured; doing so", file=sys.stderr)
        known = probe(path.parent, args.threads, args.io, progress)
    return known


@dataclass
class Recording:
    """A run that is being recorded, and, once it is written, the figures of its page."""

    recorder: Recorder
    figures: dict[str, Any] = field(default_factory=dict)


@contextmanager
def recorded(
    model: Model,
    target: str,
    ids: Sequence[int],
    tokenizer: Tokenizer | None,
    device: Profile,
    progress: Progress,
) -> Iterator[Recording]:
    """Record what the model does in the block, and write the page to ``target``.

    ids  of the prompt; device: what the page plans with
    Raises UserError where no token was processed by itself.
    """
    recorder = Recorder(model)
    found = Recording(recorder)
    with recorder.attached():
        yield found
    runs = recorder.finished()
    if not runs:
        raise UserError(f"{target}: nothing to record; at least two tokens must be written")
    tell = teller(tokenizer)
    prompt, pieces = tell(ids), [tell([token]) for token in model.stats.token_ids]
    made = (
        f"{model.bundle.path.name}, {time.strftime('%Y-%m-%d')}, a budget of "
        f"{model.plan.budget / 2**20:,.0f} MiB; measured on this machine, planned for {device.name}"
    )
    title = "A run, token by token"
    run = Recorded(title, made, prompt, pieces[: len(runs)], runs, recorder.initial)
    replay = Replay(model.bundle, runs, device)
    taken, planned = measured(runs[replay.skipped :]), replay(own_setting(model))
    text = page(model, run, replay, taken, planned, progress).encode()
    with replacing(target) as file:
        file.write(text)
    found.figures = {
        "page": target,
        "bytes": len(text),
        "device": device.name,
        "measured": taken.as_dict(),
        "planned": planned.as_dict(),
    }


def teller(tokenizer: Tokenizer | None) -> Callable[[Sequence[int]], str]:
    """A function that gives the text that tokens add to those it was given before; without a
    tokenizer their ids."""
    if tokenizer is None:
        return lambda tokens: " ".join(map(str, tokens)) + " "
    stream = TextStream(tokenizer)
    return lambda tokens: "".join([stream.add(token) for token in tokens])
