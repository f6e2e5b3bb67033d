"""Writing down a run, token by token and layer by layer: what was used, where it was, what was read
when. It changes no bit of what is computed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashinfer.formats.arrays import AnyArray, Int32Array, Int64Array
from flashinfer.model import Model
from flashinfer.paper.feedforward import FeedForward
from flashinfer.paper.flash import Submitted
from flashinfer.paper.interfaces import Chooser, Columns
from flashinfer.paper.selection import Selection


@dataclass
class LayerRun:
    """What a layer's FFN did for a token.

    begin, end    seconds since the run began
    used          the units that were used, ascending (n,)
    active        of these neurons the ones that did not give 0; None where it is not known
    place         (n,): where each was: IN_DRAM, AHEAD (read before its turn) or MISSING
    slots         (n,): the slot of each afterwards; -1: none of its own
    changed       slots that hold another unit than after the layer's turn before, and which: (m, 2)
    """

    begin: float
    end: float
    used: Int32Array
    active: Int32Array | None
    place: AnyArray
    slots: Int32Array
    changed: Int32Array


IN_DRAM, AHEAD, MISSING = 0, 1, 2


@dataclass
class Reads:
    """Reads that were submitted together.

    begin, end  seconds since the run began: when they were submitted, and when they had been waited
                for
    layer       in whose turn; streamed: pieces of a large read, of what every token uses
    offsets, lengths  in the file, int64
    """

    begin: float
    layer: int
    offsets: Int64Array
    lengths: Int64Array
    streamed: bool
    end: float = 0.0


@dataclass
class TokenRun:
    """What a pass with one token did."""

    token: int
    begin: float
    end: float = 0.0
    layers: list[LayerRun] = field(default_factory=list)
    reads: list[Reads] = field(default_factory=list)


class Recorder:
    """Records passes of one token of a model; several tokens that share a pass it leaves out.

    with Recorder(model).attached() as recorder:
        for token in model.generate(...): ...
    runs     a TokenRun each
    initial  of each layer the unit in each slot when the first of them began, -1: none
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.runs: list[TokenRun] = []
        self.initial: list[Int32Array] = []
        self.begun = time.perf_counter()
        self.run: TokenRun | None = None
        self.layer = 0
        self.flying: dict[int, list[Reads]] = {}

    @property
    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.begun

    @contextmanager
    def attached(self) -> Iterator["Recorder"]:
        """Listens while the block runs."""
        layers = self.model.layers
        ffns = [layer.feed_forward for layer in layers]
        wrapped: list[Any] = [_Heard(ffn, i, self) for i, ffn in enumerate(ffns)]
        for layer, heard in zip(layers, wrapped, strict=True):
            layer.feed_forward = heard
        self.model.flash.watcher = self
        try:
            yield self
        finally:
            self.model.flash.watcher = None
            for layer, ffn, heard in zip(layers, ffns, wrapped, strict=True):
                layer.feed_forward = ffn
                heard.leave()

    # ------------------------------------------------------------- what the flash tells

    def submitted(
        self, reads: Submitted, offsets: Int64Array, lengths: Int64Array, streamed: bool
    ) -> None:
        """Reads have begun."""
        if self.run is None or not len(offsets):
            return
        told = Reads(self.now, self.layer, offsets.copy(), lengths.copy(), streamed)
        self.run.reads.append(told)
        self.flying.setdefault(id(reads), []).append(told)

    def done(self, reads: Submitted) -> None:
        """They have been waited for."""
        for told in self.flying.pop(id(reads), ()):
            told.end = self.now

    # ------------------------------------------------------------- what the layers tell

    def begin_layer(self, number: int, tokens: int) -> None:
        """A layer's FFN begins, for so many tokens."""
        if number == 0:
            self._end()
            if not self.runs:
                layers = self.model.layers
                caches = [layer.feed_forward.store.cache for layer in layers]
                self.initial = [cache.neuron_at.copy() for cache in caches]
            self.run = TokenRun(self.model.position, self.now) if tokens == 1 else None
        self.layer = number

    def end_layer(self, run: LayerRun) -> None:
        """It has ended."""
        if self.run is not None:
            self.run.layers.append(run)
            self.run.end = run.end

    def _end(self) -> None:
        if self.run is not None and len(self.run.layers) == len(self.model.layers):
            self.runs.append(self.run)
        self.run = None

    def finished(self) -> list[TokenRun]:
        """All runs, the last one included. Reads that nobody has waited for end with them."""
        self._end()
        for run in self.runs:
            for reads in run.reads:
                reads.end = reads.end or max(run.end, reads.begin)
        return self.runs


class _Heard:
    """A FeedForward that tells a Recorder what it does; all else it is."""

    def __init__(self, ffn: FeedForward, number: int, recorder: Recorder) -> None:
        self.ffn, self.number, self.recorder = ffn, number, recorder
        self.predictor = ffn.predictor
        self.selection: Selection | None = None
        self.before = ffn.store.cache.slot_of.copy()
        self.held = ffn.store.cache.neuron_at.copy()  # the unit in each slot
        self.active: list[AnyArray] = []
        self.misses = 0
        self.dense = not ffn.neurons.config.router
        if ffn.predictor is not None:
            ffn.predictor = _Overheard(ffn.predictor, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ffn, name)

    def leave(self) -> None:
        """Take back what was changed."""
        self.ffn.predictor = self.predictor
        self.ffn.neurons.tap = None

    def tap(self, **values: AnyArray | Columns) -> None:
        """Is told the activations."""
        told = values.get("activations")
        if isinstance(told, Columns) and len(told.values) == 1:
            self.active.append(np.asarray(told.ids)[told.values[0] != 0])

    def __call__(self, x: AnyArray, tokens: Any, *rest: Any, **named: Any) -> Any:
        recorder, cache = self.recorder, self.ffn.store.cache
        recorder.begin_layer(self.number, len(x))
        self.selection, self.active = None, []
        self.ffn.neurons.tap = self.tap if self.dense else None
        now, begin, self.misses = cache.slot_of.copy(), recorder.now, cache.misses
        y = self.ffn(x, tokens, *rest, **named)
        end = recorder.now
        if len(x) == 1:
            recorder.end_layer(self._told(begin, end, now))
        self.before, self.held = cache.slot_of.copy(), cache.neuron_at.copy()
        return y

    def _told(self, begin: float, end: float, now: Int32Array) -> LayerRun:
        cache, selection = self.ffn.store.cache, self.selection
        used = np.arange(len(now), dtype=np.int32) if selection is None else selection.units
        place = np.where(now[used] < 0, MISSING, np.where(self.before[used] < 0, AHEAD, IN_DRAM))
        if self.ffn.whole.offsets is not None:
            place[:] = IN_DRAM
        elif cache.misses - self.misses == len(used):  # read whole: what is there is read, too
            place[place == IN_DRAM] = MISSING
        active = np.sort(np.concatenate(self.active)) if self.active else None
        slots = np.flatnonzero(cache.neuron_at != self.held)
        changed = np.stack([slots.astype(np.int32), cache.neuron_at[slots]], axis=1)
        return LayerRun(begin, end, used, active, place, cache.slot_of[used], changed)


class _Overheard:
    """A Chooser that notes what it chose."""

    def __init__(self, predictor: Chooser, heard: _Heard) -> None:
        self.predictor, self.heard = predictor, heard

    def __getattr__(self, name: str) -> Any:
        return getattr(self.predictor, name)

    def select(self, x: AnyArray, residual: AnyArray | None) -> Selection:
        """What the predictor selects."""
        self.heard.selection = selection = self.predictor.select(x, residual)
        return selection
