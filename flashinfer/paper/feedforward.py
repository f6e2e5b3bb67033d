"""Section 3 of the paper on one page: predict, place, read, compute, forget.

A feed-forward layer is most of a model, and a token needs few of its neurons. So the layer stays on
flash. For each token: a predictor says which neurons will fire (3.1); those that recent tokens used
are in DRAM still, in slots of a fixed memory (3.1, 3.3); the others are read, each as one bundle of
its rows and columns (3.2); and what the window has left makes room.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from flashinfer.formats.arrays import AnyArray, BoolArray, Float32Array, Int32Array, Int64Array
from flashinfer.paper.flash import Submitted
from flashinfer.paper.interfaces import Chooser, Map, Shared, Stream, Tap
from flashinfer.paper.neurons import Neurons
from flashinfer.paper.prefetch import Prefetch
from flashinfer.paper.router import Router, router_of
from flashinfer.paper.selection import Selection, Tokens
from flashinfer.paper.streamed import Streamed
from flashinfer.paper.unit_store import EVERY, UnitStore
from flashinfer.paper.waves import Waves
from flashinfer.paper.ways import (
    CACHED,
    STREAMED,
    WAVES,
    WHOLE,
    Residence,
    reads_early,
    way_to_run,
)
from flashinfer.paper.whole import Whole
from flashinfer.paper.whole_units import ResidentUnits, StreamedUnit, WholeUnits


def nothing() -> None:
    """Is called where there is nothing to do meanwhile."""


class Drafted(NamedTuple):
    """What tokens use some of which are drafts; before: which token used each unit last, before
    these (n,) int64."""

    selection: Selection
    tokens: Tokens
    before: Int64Array


class Placed(NamedTuple):
    """Units that have slots, as ``NeuronCache.place`` says, and the reads of those missing."""

    slots: Int32Array
    misses: Int32Array
    early: BoolArray
    late: Submitted | None


class Branches(NamedTuple):
    """The norms of a mixture's branches: of what its experts read, of what they give together, and
    of what the shared expert gives."""

    before: Map
    after: Map
    shared: Map


class FeedForward:
    """A layer's FFN, its units on flash: neurons, or a mixture's experts.

    neurons    Neurons: what they compute; store: UnitStore: where they are
    predictor  a Predictor, Router or RoutedPredictor: which units to use; None: all of them
    prefetch   Prefetch: what is read before the layer's turn
    shared     a SharedExpert that every token uses besides, or None
    branches   the norms of the experts and of the shared one, where these have their own, or None
    """

    def __init__(
        self,
        neurons: Neurons,
        store: UnitStore,
        predictor: Chooser | None,
        prefetch: Prefetch,
        shared: Shared | None = None,
        branches: Branches | None = None,
    ) -> None:
        self.neurons, self.store, self.predictor = neurons, store, predictor
        self.router: Router | None = router_of(predictor)
        self.prefetch, self.shared, self.branches = prefetch, shared, branches
        self.tap: Tap | None = None
        self.drafted: Drafted | None = None  # what the last call's drafts use
        self.placed: Placed | None = None  # what a token uses, where that is known before its turn
        self.whole = Whole(store, neurons)
        self.streamed: Streamed | StreamedUnit = Streamed(store, neurons)
        if isinstance(neurons, WholeUnits):
            self.whole, self.streamed = ResidentUnits(store, neurons), StreamedUnit(store, neurons)
        self.others: dict[str, Whole | Streamed | StreamedUnit | Waves] = {
            WHOLE: self.whole,
            STREAMED: self.streamed,
            WAVES: Waves(store, neurons),
        }

    def choose_early(self, h: Float32Array, tokens: Tokens) -> bool:
        """h (T, d_model), the layer's input: a router that reads it chooses now, and what a token
        misses is read while the layer's tokens are mixed. Returns whether that is so."""
        if self.router is None or not self.router.config.early:
            return False
        selection = self.router.choose_early(h)
        if not reads_early(self.residence, len(h), len(selection.units)):
            return False
        self.store.begin()
        self._note(selection, tokens, len(h))
        self.placed = self._place(selection, tokens)
        return True

    def __call__(
        self,
        x: Float32Array,
        tokens: Tokens,
        residual: Float32Array | None = None,
        meanwhile: Callable[[], None] = nothing,
    ) -> Float32Array:
        """x (T, d_model) float32, normalised, and ``residual``, before that -> (T, d_model).

        tokens     their numbers; what becomes of those that are drafts ``settle`` is told
        meanwhile  called once, when this layer's own reads are on their way
        """
        if not self.store.units.rows:  # the layer has no FFN
            meanwhile()
            return np.zeros_like(x)
        self.store.begin()
        self.neurons.begin(len(x))
        y = np.zeros_like(x) if self.shared is None else self.shared(x)  # (T, d_model)
        beside = None
        if self.branches is not None:
            beside, x, y = self.branches.shared(y), self.branches.before(residual), np.zeros_like(x)
            if self.tap:
                self.tap(shared_after_norm=beside, experts_norm=x)
        selection = self.predict(x, residual, tokens)
        way = self.way(selection, len(x))
        if way == CACHED:
            self.compute(x, selection, tokens, y, meanwhile)
        else:
            meanwhile()
            self.others[way](x, selection, tokens, y)
        self.neurons.finish(selection, y)
        self.store.settled = True
        if self.branches is not None:
            y = self.branches.after(y)
            if self.tap:
                self.tap(experts_after_norm=y)
            y = beside + y
        return y

    def predict(self, x: Float32Array, residual: Float32Array, tokens: Tokens) -> Selection:
        """3.1: the units that these tokens need, before any of their weights is read."""
        if self.predictor is None:
            return Selection.everything(self.store.units.rows, len(x))
        selection = self.predictor.select(x, residual)  # units (n,) ascending, and who uses which
        if self.whole.offsets is None and self.placed is None:
            self._note(selection, tokens, len(x))
        return selection

    def _note(self, selection: Selection, tokens: Tokens, n: int) -> None:
        """Before units are placed: that these ``n`` tokens use them."""
        cache, counted = self.store.cache, selection
        self.drafted = None
        if tokens.sure < n:
            self.drafted = Drafted(selection, tokens, cache.last_uses(selection.units))
            counted = selection.between(0, tokens.sure)
        cache.priority.note(counted, tokens.first)
        self.prefetch.before_placing(self.store, selection.units)

    def _place(self, selection: Selection, tokens: Tokens) -> Placed:
        """3.3: each unit has a slot of the cache, as what left the window has made room; and 3.2:
        one read for each bundle that is missing, many in flight."""
        units, store = selection.units, self.store
        slots, misses, early = store.cache.place(units, tokens.now)  # (n,), (m,), (n,) bool
        if early.any():
            self.prefetch.hasten(store)
        return Placed(slots, misses, early, store.submit(units[misses], slots[misses]))

    def settle(self, kept: int) -> None:
        """Of the last call's tokens, some of which were drafts, the first ``kept`` belong to the
        text: what these used counts, and what only the others used leaves first."""
        if self.drafted is None:
            return
        selection, (first, sure), before = self.drafted
        self.drafted, cache = None, self.store.cache
        if kept > sure:
            cache.priority.note(selection.between(sure, kept), first)
        if cache.window is not None:
            used = selection.between(0, kept)
            before[np.isin(selection.units, used.units)] = first + used.last
            cache.restore_uses(selection.units, before)

    def compute(
        self,
        x: Float32Array,
        selection: Selection,
        tokens: Tokens,
        y: Float32Array,
        meanwhile: Callable[[], None],
    ) -> None:
        """3.1 to 3.3 for units that all have slots: y (T, d_model) += their outputs."""
        cache, store, units = self.store.cache, self.store, selection.units  # (n,)
        placed, self.placed = self.placed, None
        slots, misses, early, late = placed or self._place(selection, tokens)
        offsets = store.offsets(units, slots)  # (n, neurons of each)
        meanwhile()
        a = np.empty((*offsets.shape, len(x)), dtype=np.float32)  # (n, neurons of each, T)
        if isinstance(self.neurons, WholeUnits):
            self._compute_units(x, selection, offsets, store.arrivals(
                early, misses, self.prefetch.taken(), late, selection), y)  # fmt: skip
            cache.used_at(slots, tokens.first, selection.last)
            return
        # Those in DRAM are computed while the others come: a_i = relu(up_i . x), or gated.
        for which in store.arrivals(early, misses, self.prefetch.taken(), late, selection):
            part = self.neurons.activations(
                cache.memory, offsets[which].ravel(), x, self.neurons.of(units[which]),
                selection.indptr, selection.tokens,
            )  # (neurons of which, T); (pairs,) where each token uses units of its own  # fmt: skip
            if which is EVERY:
                a = part
            else:
                a[which] = part.reshape(-1, *a.shape[1:])
        a = a if selection.indptr is not None else a.reshape(-1, len(x))
        down = offsets.ravel() + self.neurons.down_at  # (neurons,)
        self.neurons.add_down(cache.memory, down, a, selection, y)
        # 3.1: with a window of k tokens a unit is forgotten when the last k did not use it.
        cache.used_at(slots, tokens.first, selection.last)

    def _compute_units(
        self,
        x: Float32Array,
        selection: Selection,
        offsets: Int64Array,
        arrivals: Iterator[AnyArray | slice],
        y: Float32Array,
    ) -> None:
        """One token's units that are used whole: each is computed when it is there, and they are
        added in ascending order."""
        units, neurons = selection.units, self.neurons
        assert isinstance(neurons, WholeUnits)
        outputs = np.empty((len(units), x.shape[1]), dtype=np.float32)
        for which in arrivals:
            for i in np.arange(len(units))[which]:
                outputs[i] = neurons.outputs(
                    self.store.cache.memory, offsets[i], units[i], x
                )[0]  # fmt: skip
        for weight, output in zip(selection.weights, outputs, strict=True):
            y += weight * output

    def abandon(self) -> None:
        """After a failure, once no read is in flight: forgets what may not have been read."""
        self.prefetch.taken()
        self.drafted = self.placed = None
        self.store.abandon()

    def way(self, selection: Selection, tokens: int) -> str:
        """How this layer runs for so many tokens: see ways.py."""
        cache, units = self.store.cache, selection.units

        def missing() -> float:
            return float(np.count_nonzero(cache.slot_of[units] < 0))

        return way_to_run(self.residence, tokens, len(units), missing)

    @property
    def residence(self) -> Residence:
        """What of this layer is in DRAM."""
        cache, store = self.store.cache, self.store
        return Residence(
            self.predictor is not None, store.units.rows, self.neurons.config.unit_neurons,
            cache.capacity, self.whole.offsets is not None, cache.transit,
            self.neurons.config.chooses_early,
        )  # fmt: skip

    def set_tap(self, tap: Tap | None) -> None:
        """Tell ``tap`` the intermediate values from now on; None: nobody."""
        self.tap = self.neurons.tap = tap
        if self.predictor is not None:
            self.predictor.set_tap(tap)
        if self.shared is not None:
            self.shared.tap = tap

    def streams(self) -> tuple[Stream, ...]:
        """What is streamed at every token here, in this order."""
        if not self.store.units.rows:
            return ()
        parts = () if self.shared is None else self.shared.streams()
        if self.predictor is not None:
            return (*parts, *self.predictor.streams())
        return parts if self.whole.offsets is not None else (*parts, *self.streamed.streams())
