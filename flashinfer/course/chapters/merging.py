"""Chapter 4: merge reads of neighbours."""

from collections.abc import Callable

import numpy as np

from flashinfer import kernels
from flashinfer.course.engine import opened, run, text
from flashinfer.course.lesson import Answer, Grade, in_place_of, shown
from flashinfer.formats.arrays import Int64Array
from flashinfer.kernels.direct_io import merge_reads as explained

TITLE = "merge reads"
ENGINE = "flashinfer/kernels/direct_io.py: merge_reads"
EVERYWHERE = 1 << 40


def merge(
    offsets: Int64Array, lengths: Int64Array, gap_bytes: int, most_bytes: int
) -> tuple[Int64Array, Int64Array]:
    """Merge reads that are neighbours on flash: a request costs more than a few bytes too many.

    offsets, lengths  (n,) ascending: the bytes that are wanted, in the file
    gap_bytes         reads that lie at most so far apart become one, which reads what is between
                      them, too
    most_bytes        no merged read is longer than this
    Returns (offsets, lengths) of the reads, ascending, as few as possible. Each wanted range lies
    within one of them.
    """
    # Destinations far apart: nothing is read in place, so that all merged reads are staged.
    apart = np.arange(len(offsets), dtype=np.int64) * EVERYWHERE
    straight, staged, _ = explained(offsets, lengths, apart, gap_bytes, most_bytes, EVERYWHERE)
    reads = np.concatenate([straight, staged], axis=1)
    order = np.argsort(reads[0], kind="stable")
    return reads[0, order], reads[1, order]


solution = merge


def examples(answer: Answer) -> None:
    """A few ranges: side by side, apart by the gap and by a byte more, and too long together."""
    random = np.random.default_rng(0)
    for number in range(200):
        n = int(random.integers(0, 7))
        lengths = np.full(n, int(random.integers(1, 5)), dtype=np.int64)
        gaps = random.integers(0, 5, size=n)
        offsets = np.cumsum(lengths + gaps).astype(np.int64)
        judged(answer, offsets, lengths, number % 4, int(random.integers(4, 20)))


def judged(
    answer: Answer, offsets: Int64Array, lengths: Int64Array, gap_bytes: int, most_bytes: int
) -> tuple[Int64Array, Int64Array]:
    """The reads that the answer makes. Raises Wrong where they are not what was asked for."""
    given = answer(offsets.copy(), lengths.copy(), gap_bytes, most_bytes)
    if not isinstance(given, tuple) or len(given) != 2:
        raise answer.wrong(f"gave {shown(given)}; (offsets, lengths) is wanted")
    starts, sizes = (answer.array(given[i], np.int64, ("offsets", "lengths")[i]) for i in (0, 1))
    case = (
        f"of {shown(offsets)} with {shown(lengths)} bytes each, gap_bytes {gap_bytes}, most_bytes "
        f"{most_bytes}: "
    )
    if len(starts) != len(sizes):
        raise answer.wrong(f"{case}gave {len(starts)} offsets and {len(sizes)} lengths")
    if (np.diff(starts) < 0).any():
        raise answer.wrong(f"{case}the reads {shown(starts)} are not ascending")
    which = np.searchsorted(starts, offsets, side="right") - 1
    ends = starts + sizes
    inside = (which >= 0) & (offsets + lengths <= ends[which]) if len(starts) else which > 0
    if not np.all(inside):
        i = int(np.flatnonzero(~inside)[0])
        raise answer.wrong(
            f"{case}the {lengths[i]} bytes at {offsets[i]} lie in none of the reads "
            f"{shown(starts)} of {shown(sizes)} bytes"
        )
    for read in range(len(starts)):
        _refuse_read(answer, case, read, starts, sizes, which, offsets, lengths, gap_bytes,
                     most_bytes)  # fmt: skip
    fewest = len(merge(offsets, lengths, gap_bytes, most_bytes)[0])
    if len(starts) > fewest:
        raise answer.wrong(f"{case}{len(starts)} reads; {fewest} would do")
    return starts, sizes


def _refuse_read(
    answer: Answer,
    case: str,
    read: int,
    starts: Int64Array,
    sizes: Int64Array,
    which: Int64Array,
    offsets: Int64Array,
    lengths: Int64Array,
    gap_bytes: int,
    most_bytes: int,
) -> None:
    """Raises Wrong where a read is too long, or reads what nobody wants."""
    begin, size = int(starts[read]), int(sizes[read])
    rows = np.flatnonzero(which == read)
    told = f"{case}the read of {size} bytes at {begin} "
    if not len(rows):
        raise answer.wrong(f"{told}is wanted by nobody")
    first, last = int(offsets[rows[0]]), int((offsets + lengths)[rows].max())
    if begin != first or begin + size != last:
        raise answer.wrong(f"{told}should begin at {first} and end at {last}")
    if len(rows) == 1:
        return
    if size > most_bytes:
        raise answer.wrong(f"{told}is longer than most_bytes")
    gaps = offsets[rows[1:]] - (offsets + lengths)[rows[:-1]]
    if gaps.max() > gap_bytes:
        raise answer.wrong(f"{told}spans a gap of {gaps.max()} bytes, more than gap_bytes")


def in_engine(
    answer: Answer,
    offsets: Int64Array,
    lengths: Int64Array,
    destinations: Int64Array,
    gap_bytes: int,
    most_bytes: int,
    room: int,
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """As ``kernels.merge_reads``, which also says where the bytes go, with the answer's reads."""
    straight, staged, copies = [], [], []
    done = used = 0
    starts, sizes = judged(answer, offsets, lengths, gap_bytes, most_bytes)
    for begin, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        n = done + int(np.count_nonzero(offsets[done:] + lengths[done:] <= begin + size))
        rows = range(done, n)
        done = n
        if len(rows) == 1 or used + size > room:
            straight += [(offsets[i], lengths[i], destinations[i]) for i in rows]
            continue
        staged.append((begin, size, used))
        copies += [(destinations[i], used + offsets[i] - begin, lengths[i]) for i in rows]
        used += size
    return _columns(straight), _columns(staged), _columns(copies)


def _columns(rows: list[tuple[int, int, int]]) -> Int64Array:
    return np.ascontiguousarray(np.array(rows, dtype=np.int64).reshape(-1, 3).T)


def grades(answer: Answer, progress: Callable[[float], None]) -> list[Grade]:
    """The demo model, its reads merged by the answer."""
    ids = text()
    with opened() as model:
        own = run(model, ids)
    with (
        in_place_of(kernels, "merge_reads", lambda *arguments: in_engine(answer, *arguments)),
        opened() as model,
    ):
        got = run(model, ids, progress)
    return [
        Grade("bits of the logits", got.digest, own.digest),
        Grade("reads a token", got.reads, own.reads, own.reads),
        Grade("bytes a token", got.nbytes, own.nbytes, own.nbytes),
    ]
