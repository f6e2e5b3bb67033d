"""A recorded run again, with another memory, window, disk or idea of the paper: what it would read,
and how long a token would take by the cost model's clocks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from flashinfer.formats.arrays import Int32Array, Int64Array
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.paper.flash import PIECE_BYTES, STAGING_BYTES, reads_of, row_spans
from flashinfer.paper.neuron_cache import NeuronCache
from flashinfer.paper.selection import Selection
from flashinfer.plan.profile import Profile
from flashinfer.plan.timeline import Timeline
from flashinfer.study.watch.recorder import TokenRun

MEMORY = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)  # of the units: so many have slots
WINDOWS = (1, 2, 5, 10, 0)  # tokens; 0: as many as the slots hold
CHUNKS = (0, 4096, 32768)  # bytes between units that are read along
DISKS = {"as measured": 0.0, "1 GB/s": 1e9, "250 MB/s (eMMC)": 250e6, "90 MB/s (SD card)": 90e6}
COLD = 8  # tokens at most that only fill the cache
IDEAS = ("predict", "keep", "bundle", "many in flight")


@dataclass(frozen=True)
class Setting:
    """What a run is replayed with.

    memory   share of the units that have slots; window: tokens, 0: as many as the slots hold
    chunk    bytes between two units that are read as one with them
    disk     bytes/s that the flash is held to, 0: as it was measured
    predict  only the units that were used are read, else all of a layer
    keep     units stay for the next token
    bundle   a unit is one read, else one for each of its parts
    many     reads are in flight together, else one after the other
    """

    memory: float
    window: int
    chunk: int
    disk: float
    predict: bool = True
    keep: bool = True
    bundle: bool = True
    many: bool = True


@dataclass(frozen=True)
class Replayed:
    """Means a token: seconds; bytes from flash; reads of units; share of the units used that were
    in DRAM."""

    seconds: float
    nbytes: float
    reads: float
    hits: float

    def as_dict(self) -> dict[str, float]:
        """The figures, as ``--json`` has them."""
        return {
            "tokens_per_second": 1 / self.seconds,
            "flash_bytes_per_token": self.nbytes,
            "reads_per_token": self.reads,
            "hit_rate": self.hits,
        }


class Replay:
    """Replays a recorded run of a bundle on a device."""

    def __init__(self, bundle: Bundle, runs: Sequence[TokenRun], profile: Profile) -> None:
        self.profile = profile
        self.tensors = [bundle.bundles(i) for i in range(bundle.config.num_hidden_layers)]
        self.ffns = [layer.ffn for layer in bundle.config.layers]
        self.unit_bytes = [bundle.unit_bytes(i) for i in range(len(self.ffns))]
        self.runs = runs
        self.skipped = min(COLD, len(runs) // 4)
        # What a token takes beside its FFNs (attention, head, Python), and what is streamed for it.
        self.others = float(np.mean([_others(run) for run in runs])) if runs else 0.0
        self.streamed = float(np.mean([_streamed(run) for run in runs])) if runs else 0.0
        self._misses: dict[tuple[float, int, bool, bool], list[list[Int32Array]]] = {}
        self._reads: dict[Setting, list[list[tuple[int, int]]]] = {}

    def __call__(self, setting: Setting) -> Replayed:
        """The run in a Setting."""
        profile = self.profile.held(setting.disk) if setting.disk else self.profile
        reads = self._reads_of(setting)
        seconds, nbytes, requests, used, missed = 0.0, 0.0, 0.0, 0, 0
        for token, layers in enumerate(reads):
            if token < self.skipped:
                continue
            line = Timeline(profile)
            line.compute("others", self.others)
            for number, (size, count) in enumerate(layers):
                n, misses = self._counts(setting, token, number)
                used, missed = used + n, missed + misses
                self._layer(line, setting, number, n, misses, size, count)
                nbytes, requests = nbytes + size, requests + count
            seconds += line.now
        n_tokens = max(1, len(reads) - self.skipped)
        return Replayed(
            seconds / n_tokens,
            nbytes / n_tokens + self.streamed,
            requests / n_tokens,
            1 - missed / max(1, used),
        )

    def _layer(
        self, line: Timeline, setting: Setting, number: int, n: int, misses: int, size: int,
        count: int,
    ) -> None:  # fmt: skip
        """A layer's FFN: what is there is computed while the rest comes."""
        tensor = self.tensors[number]
        whole = self.profile.sparse_seconds(tensor) / self.ffns[number].units
        if setting.many:
            done = line.submit(count, size)
        else:
            done = line.now + count * line.profile.batch_seconds(1, size / max(1, count))
            done = max(done, line.profile.allowed_after(count, size)) if count else line.now
        line.multiply("feed-forward", whole * (n - misses))
        line.wait(done)
        line.multiply("feed-forward", whole * misses)

    def _counts(self, setting: Setting, token: int, number: int) -> tuple[int, int]:
        """(units used, units missed)."""
        missing = len(self._misses_of(setting)[token][number])
        if not setting.predict:
            return self.ffns[number].units, missing
        return len(self.runs[token].layers[number].used), missing

    def _misses_of(self, setting: Setting) -> list[list[Int32Array]]:
        """Of each token and layer the units that are missing."""
        key = (setting.memory, setting.window, setting.predict, setting.keep)
        if key not in self._misses:
            columns = [list(self._layer_misses(setting, i)) for i in range(len(self.ffns))]
            self._misses[key] = [list(row) for row in zip(*columns, strict=True)]
        return self._misses[key]

    def _layer_misses(self, setting: Setting, number: int) -> Iterator[Int32Array]:
        """Of each token the units that are missing in a layer."""
        units = self.ffns[number].units
        slots = round(setting.memory * units)
        window = setting.window or None
        cache = NeuronCache(
            units, np.zeros(slots, np.uint8), 1, "window" if window else "frecency", window
        )
        for token, run in enumerate(self.runs):
            used = run.layers[number].used
            if not setting.predict:
                used = np.arange(units, dtype=np.int32)
            if not setting.keep or len(used) > slots:  # nothing stays, or it comes in waves
                held = used[cache.slot_of[used] >= 0] if setting.keep else used[:0]
                yield np.setdiff1d(used, held, assume_unique=True)
                continue
            cache.priority.note(_selection(used), token)
            placed, misses, _ = cache.place(used, token)
            cache.used_at(placed, token, np.zeros(len(placed), dtype=np.int32))
            yield used[misses]

    def _reads_of(self, setting: Setting) -> list[list[tuple[int, int]]]:
        """Of each token and layer (bytes, reads)."""
        same = replace(setting, disk=0.0, many=True)
        if same not in self._reads:
            self._reads[same] = [
                [self._merged(number, units, setting) for number, units in enumerate(layers)]
                for layers in self._misses_of(setting)
            ]
        return self._reads[same]

    def _merged(self, number: int, units: Int32Array, setting: Setting) -> tuple[int, int]:
        """(bytes, reads) of some units of a layer."""
        if not len(units):
            return 0, 0
        nbytes, parts = self.unit_bytes[number], 1
        if len(units) == self.ffns[number].units:  # all: one sequential read
            total = len(units) * nbytes
            return total, -(-total // PIECE_BYTES)
        if not setting.bundle:
            parts = self.ffns[number].parts
            nbytes //= parts
        places = np.sort(self.tensors[number].place(units.astype(np.int64)))
        offsets, lengths, _ = row_spans(0, nbytes, places, 512)
        slots: Int64Array = 2 * np.arange(len(units)) * int(lengths.max())
        straight, staged, _ = reads_of(offsets, lengths, slots, setting.chunk, STAGING_BYTES)
        size = int(straight[1].sum() + staged[1].sum())
        return parts * size, parts * (len(straight[1]) + len(staged[1]))


def _selection(used: Int32Array) -> Selection:
    return Selection(used, None, None, np.zeros(len(used), dtype=np.int32))


def _others(run: TokenRun) -> float:
    """Seconds of a token that no FFN takes."""
    return run.end - run.begin - sum(layer.end - layer.begin for layer in run.layers)


def _streamed(run: TokenRun) -> int:
    """Bytes of a token that are no unit's."""
    return sum(int(reads.lengths.sum()) for reads in run.reads if reads.streamed)


def settings() -> Iterator[Setting]:
    """Every Setting that the page has controls for, in the order of its axes."""
    ideas = list(product((True, False), repeat=len(IDEAS)))
    for memory, window, chunk, disk in product(MEMORY, WINDOWS, CHUNKS, DISKS.values()):
        for switches in ideas:
            yield Setting(memory, window, chunk, disk, *switches)


def replay_all(replay: Replay, progress: Progress = no_progress) -> list[Replayed]:
    """The run in each of ``settings``."""
    every = list(settings())
    known: dict[Setting, Replayed] = {}
    for number, setting in enumerate(every):
        same = _canonical(setting)
        if same not in known:
            known[same] = replay(same)
            progress("replay", number, len(every))
    progress("replay", len(every), len(every))
    return [known[_canonical(setting)] for setting in every]


def _canonical(setting: Setting) -> Setting:
    """The Setting that stands for all that read the same: where nothing stays, or all of a layer is
    used and does not fit, neither memory nor window matters."""
    if not setting.keep or (not setting.predict and setting.memory < 1):
        return replace(setting, memory=MEMORY[0], window=0)
    return setting if setting.predict else replace(setting, window=0)
