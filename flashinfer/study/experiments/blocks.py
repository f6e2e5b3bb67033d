"""How fast this disk reads, by the size of a read and the number in flight."""

from pathlib import Path

from flashinfer.formats.files import scratch_directory
from flashinfer.paper.flash import Flash
from flashinfer.probe import measuring
from flashinfer.probe.probing import write_file
from flashinfer.study.activity import Study
from flashinfer.study.findings import Cell, Chart, Finding, Table

BLOCKS = tuple(4096 << k for k in range(9))  # bytes of a read
COUNTS = (1, 4, 16, 64)  # reads in flight
# Bytes of a neuron's bundle in f16, and of an expert in q4_0, of published shapes.
KNOWN = {"OPT-1.3B": 8192, "OPT-6.7B": 16384, "Llama-2-7B": 24576, "OLMoE (expert, q4_0)": 3538944}


def run(study: Study) -> Finding:
    """The Finding of the disk that holds the study's model."""
    speeds = measured(study.path, study)
    best = max(max(row.values()) for row in speeds.values())
    rows: list[list[Cell]] = [
        [f"{block >> 10} KiB", *(speeds[block][count] / 1e6 for count in COUNTS)]
        for block in BLOCKS
    ]
    small, deep = speeds[BLOCKS[0]], COUNTS[-1]
    answer = [
        f"Reads of 4 KiB reach {small[1] / 1e6:.3g} MB/s one at a time and {small[deep] / 1e6:.3g} "
        f"MB/s with {deep} in flight, where the most that was measured is {best / 1e6:,.0f} MB/s.",
        f"Half of that needs reads of {needed(speeds, 1, best / 2)} one at a time, and of "
        f"{needed(speeds, deep, best / 2)} with {deep} in flight. So a neuron's rows and columns "
        "are stored as one bundle, and a layer's reads are submitted together.",
    ]
    return Finding(
        "blocks",
        "Blocks: what a read costs by its size",
        "How large must a read be, and how many must be in flight, to use the disk?",
        "Section 3.2, figure 2: random reads approach the disk's speed from 32 KiB on, with many "
        "threads.",
        answer,
        [Table("MB/s of random reads", ["bytes of a read", *(f"{n} in flight" for n in COUNTS)],
               rows)],
        [Chart("Throughput of random reads", "bytes of a read", "MB/s",
               {f"{count} in flight": [(float(block), speeds[block][count] / 1e6)
                                       for block in BLOCKS] for count in COUNTS},
               log_x=True, log_y=True,
               marks={name: float(size) for name, size in KNOWN.items() if size <= BLOCKS[-1]})],
    )  # fmt: skip


def measured(path: Path, study: Study) -> dict[int, dict[int, float]]:
    """{bytes of a read: {reads in flight: bytes/s}} of the disk that holds ``path``."""
    speeds: dict[int, dict[int, float]] = {block: {} for block in BLOCKS}
    steps = len(BLOCKS) * len(COUNTS)
    with scratch_directory(path.parent, "study") as folder:
        size = write_file(folder / "reads.bin")
        flash = Flash(folder / "reads.bin", study.options.io, gap_bytes=0)
        try:
            for number, block in enumerate(BLOCKS):
                for other, count in enumerate(COUNTS):
                    speeds[block][count] = measuring.in_flight(flash, size, block, count)
                    study.progress("blocks", number * len(COUNTS) + other + 1, steps)
        finally:
            flash.close()
    return speeds


def needed(speeds: dict[int, dict[int, float]], count: int, speed: float) -> str:
    """The smallest read that reaches a speed."""
    for block in BLOCKS:
        if speeds[block][count] >= speed:
            return f"{block >> 10} KiB"
    return f"more than {BLOCKS[-1] >> 10} KiB"
