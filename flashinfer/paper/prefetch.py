"""Reading what a layer will probably need before its turn (beyond the paper)."""

from typing import Protocol

from flashinfer.formats.arrays import Float32Array, Int32Array
from flashinfer.paper.flash import Submitted
from flashinfer.paper.interfaces import Chooser
from flashinfer.paper.neurons import Neurons
from flashinfer.paper.unit_store import UnitStore
from flashinfer.paper.ways import Residence, may_prefetch, prefetch_fits, prefetch_waits


class Guessed(Protocol):
    """What a FeedForward says of itself to whoever reads for it before its turn."""

    neurons: Neurons
    predictor: Chooser | None
    store: UnitStore

    @property
    def residence(self) -> Residence:
        """What of the layer is in DRAM."""


class Prefetch:
    """Asks a layer's predictor or router one layer early, and begins to read what it names.

    A guess costs bandwidth where it is wrong, and never changes a result.

    share  of a guess, the surest first, that is read
    reads  those begun and not yet waited for, or None
    """

    def __init__(self, share: float = 1.0) -> None:
        self.share = share
        self.reads: Submitted | None = None

    def begin(self, ffn: Guessed, x: Float32Array, token: int, residual: Float32Array) -> None:
        """Begin to read for a FeedForward what ``token`` will probably need.

        x, residual (1, d_model): the layer's input, after its norm and before, as it would be if
        the layers still to come before it added nothing.
        """
        cache, predictor = ffn.store.cache, ffn.predictor
        in_dram = predictor is not None and predictor.in_dram
        if not (cache.guesses_pay and may_prefetch(ffn.residence, in_dram, self.share)):
            return
        units, kept = predictor.early(x, residual, self.share)
        if prefetch_fits(len(units), ffn.neurons.config.routed_units, cache.capacity):
            store = ffn.store
            store.settled = False
            placed = cache.place_prefetched(units, kept, token)
            self.reads = store.submit(*placed, urgent=not prefetch_waits(store.units.row_bytes))

    def before_placing(self, store: UnitStore, units: Int32Array) -> None:
        """Wait for the reads, unless placing these units leaves the slots alone that they fill."""
        if self.reads is not None and not store.cache.leaves_guesses(units):
            store.wait(self.taken())

    def hasten(self, store: UnitStore) -> None:
        """Some of what was guessed is needed: reads that were held begin."""
        if self.reads is not None:
            store.flash.hasten(self.reads)

    def taken(self) -> Submitted | None:
        """The reads that were begun, which are then the caller's to wait for."""
        reads, self.reads = self.reads, None
        return reads


class NoPrefetch(Prefetch):
    """Reads nothing before its turn."""

    def begin(self, ffn: Guessed, x: Float32Array, token: int, residual: Float32Array) -> None:
        """Does nothing."""
