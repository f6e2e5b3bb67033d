import os

import numpy as np
import pytest

from flashinfer import kernels
from flashinfer.formats.bundle.in_place import FILE_BYTES
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.number_formats import FORMATS
from flashinfer.paper.flash import MERGED_BYTES, STAGING_BYTES, STAGINGS, Flash, aligned_bytes


@pytest.fixture
def file(tmp_path):
    """A file of 1 MiB of random bytes: (path, its bytes)."""
    content = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    path = tmp_path / "x.flash"
    path.write_bytes(content.tobytes())
    return path, content


@pytest.fixture(params=["auto", "threads", "buffered"])
def flash(file, request, twin, capsys):
    try:
        flash = Flash(file[0], request.param)
    except FormatError as error:
        pytest.skip(str(error))
    yield flash
    flash.close()


def int64(*values):
    return np.array(values, dtype=np.int64)


def test_scattered_reads_arrive_where_they_should(flash, file):
    random, memory, flash.gap_bytes = np.random.default_rng(1), aligned_bytes(1 << 20), 0
    places = random.permutation(256)
    offsets = np.sort(random.choice(256, 60, replace=False)).astype(np.int64) * 4096
    destinations = places[:60].astype(np.int64) * 4096
    flash.wait(flash.submit(offsets, np.full(60, 4096), memory, destinations))
    for offset, destination in zip(offsets, destinations, strict=True):
        there = memory[destination : destination + 4096]
        assert np.array_equal(there, file[1][offset : offset + 4096])
    assert flash.bytes_read == 60 * 4096


def test_neighbours_are_read_as_one(flash, file):
    memory, flash.gap_bytes = aligned_bytes(1 << 16), 4096
    offsets, to = int64(0, 4096, 12288, 20480, 32768), int64(0, 8192, 40960, 20480, 4096)
    submitted = flash.submit(offsets, np.full(5, 4096), memory, to)
    flash.wait(submitted)
    assert [part[1].tolist() for part in submitted.parts] == [[32768], [0]]
    assert [part[2].tolist() for part in submitted.parts] == [[4096], [24576]]
    for offset, destination in zip(offsets, to, strict=True):
        there = memory[destination : destination + 4096]
        assert np.array_equal(there, file[1][offset : offset + 4096])


@pytest.mark.parametrize("row_bytes", [60, 512, 700, 2304, 5000])
@pytest.mark.parametrize("gap_bytes", [0, 4096, 20_000])
def test_rows_arrive_however_they_are_merged(flash, file, row_bytes, gap_bytes):
    """Rows that share blocks, lie side by side or apart, to rows in any order."""
    flash = Flash(flash.path, flash.io, gap_bytes)
    random = np.random.default_rng(5)
    tensor = StoredTensor("t", 4096, 200, row_bytes // 2, FORMATS["f16"])
    stride = flash.slot_bytes(row_bytes)
    memory = aligned_bytes(200 * stride)
    expected = file[1][4096 : 4096 + tensor.nbytes].reshape(200, -1)
    reads = []
    for share in (0.05, 0.3, 0.9, 1.0):
        rows = np.flatnonzero(random.random(200) < share)
        places = random.permutation(200)[: len(rows)] * stride
        offsets, lengths, skips = flash.row_spans(tensor, rows)
        memory[:] = 0
        submitted = flash.submit(offsets, lengths, memory, places)
        flash.wait(submitted)
        reads.append(sum(len(part[1]) for part in submitted.parts))
        assert len(flash.staging) == STAGINGS
        for row, place in zip(rows, places + skips, strict=True):
            assert np.array_equal(memory[place : place + row_bytes], expected[row])
    if 200 * row_bytes + 2 * MERGED_BYTES < STAGING_BYTES:
        assert reads[-1] <= 1 + tensor.nbytes / MERGED_BYTES + 1


def test_nothing_to_read(flash):
    flash.wait(flash.submit(int64(), int64(), aligned_bytes(4096), int64()))


def test_reads_that_can_wait_begin_when_they_delay_no_others(flash, file, monkeypatch):
    memory, begun, send = aligned_bytes(1 << 16), [], flash._send

    def sent(offsets, *others):
        begun.extend(offsets.tolist())
        return send(offsets, *others)

    def submit(page, **options):
        at = int64(4096 * page)
        return flash.submit(at, int64(4096), memory, at, **options)

    monkeypatch.setattr(flash, "_send", sent)
    submit_early = submit(0, urgent=False)  # nothing is in flight
    assert begun == [0]
    first, second = submit(1), submit(2)
    held, waited = submit(3, urgent=False), submit(4, urgent=False)
    assert begun == [0, 4096, 8192] and flash.reads == 3
    flash.wait(waited)  # who waits for it cannot do without
    flash.wait(first)
    flash.wait(submit_early)
    assert begun == [0, 4096, 8192, 16384]
    flash.wait(second)
    assert begun == [0, 4096, 8192, 16384, 12288]
    flash.wait(held)
    assert np.array_equal(memory[: 5 * 4096], file[1][: 5 * 4096])
    assert not flash.flying and not flash.held


def test_what_is_held_is_never_read_after_a_failure(flash):
    memory = aligned_bytes(1 << 16)
    lost = flash.submit(int64(1 << 20), int64(4096), memory, int64(0))
    # Rows apart in memory, by way of a staging buffer.
    held = flash.submit(int64(0, 4096), int64(4096, 4096), memory, int64(8192, 32768), urgent=False)
    buffers = len(flash.staging)
    with pytest.raises(FormatError):
        flash.wait(lost)
    flash.settle()
    assert held.parts == [] and not flash.flying and not flash.held
    assert len(flash.staging) == buffers + 1 and not memory.any()


def test_reading_past_the_end_names_file_offset_and_length(flash):
    memory = aligned_bytes(1 << 16)
    submitted = flash.submit(int64(0, 1 << 20), int64(4096, 8192), memory, int64(0, 4096))
    with pytest.raises(FormatError, match=r"x\.flash: reading 8192 bytes at 1048576: the file end"):
        flash.wait(submitted)


def test_an_error_of_the_device_names_offset_and_length(flash):
    memory = aligned_bytes(1 << 16)
    os.close(flash.files[0].fd)  # every read fails with EBADF
    submitted = flash.submit(int64(4096), int64(512), memory, int64(0))
    with pytest.raises(FormatError, match="512 bytes at 4096: Bad file descriptor"):
        flash.wait(submitted)
    flash.files[0].fd = os.open(flash.path, os.O_RDONLY)


@pytest.mark.parametrize("columns", [1, 30, 256, 1000, 2048])
@pytest.mark.parametrize("buffer_bytes", [64 << 10, 200_000, 4 << 20])
def test_stream_yields_every_row_once(flash, file, columns, buffer_bytes):
    rows = min(300, (1 << 19) // (2 * columns))
    tensor = StoredTensor("t", 8192, rows, columns, FORMATS["f16"])
    expected = file[1][8192 : 8192 + tensor.nbytes].reshape(rows, -1)
    buffer = aligned_bytes(buffer_bytes)
    at = 0
    for first, stop, memory, starts in flash.stream(tensor, buffer):
        assert first == at and len(starts) == stop - first
        for row, start in zip(range(first, stop), starts, strict=True):
            assert np.array_equal(memory[start : start + tensor.row_bytes], expected[row])
        at = stop
    assert at == rows


@pytest.mark.parametrize("columns", [30, 256, 1000])
def test_single_rows(flash, file, columns):
    tensor = StoredTensor("t", 4096, 200, columns, FORMATS["f16"])
    wanted = np.random.default_rng(2).integers(0, 200, 70)
    found = np.zeros((70, tensor.row_bytes), np.uint8)
    buffer = aligned_bytes(16 << 10)
    for position, n, memory, starts in flash.read_rows(tensor, wanted, buffer):
        for i in range(n):
            found[position + i] = memory[starts[i] : starts[i] + tensor.row_bytes]
    expected = file[1][4096 : 4096 + tensor.nbytes].reshape(200, -1)[wanted]
    assert np.array_equal(found, expected)


def test_a_row_has_room_for_any_span(flash):
    for row_bytes in (2, 60, 512, 1536, 3072, 8192, 10240, 4098):
        stride = flash.slot_bytes(row_bytes)
        for row in range(70):
            start, length, skip = flash.span(row * row_bytes, row_bytes)
            assert length <= stride and skip + row_bytes <= length
            assert start % flash.alignment == length % flash.alignment == 0
    assert flash.slot_bytes(8192) == 8192  # no waste where bundles are whole pages


def test_tickets_dropped_while_reading_do_no_harm(flash):
    for _ in range(20):
        memory = aligned_bytes(1 << 20)
        flash.submit_range(0, 1 << 20, memory)
        del memory


def test_a_file_system_without_direct_io_is_said_once(tmp_path, capsys):
    if not os.path.isdir("/dev/shm") or not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs here")
    path = f"/dev/shm/flashinfer-test-{os.getpid()}"
    try:
        with open(path, "wb") as file:
            file.write(bytes(8192))
        flash = Flash(path)
        direct = flash.io != "buffered"
        flash.close()
        said = capsys.readouterr().err
        assert direct or said.count("no O_DIRECT") == 1  # newer kernels have it on tmpfs
        if not direct:
            with pytest.raises(FormatError, match="--io buffered"):
                Flash(path, "threads")
    finally:
        os.unlink(path)


def test_more_reads_than_the_ring_holds(flash, file):
    """Some thousand small reads at once, in no order."""
    random, memory = np.random.default_rng(4), aligned_bytes(1 << 20)
    blocks = random.permutation(2048).astype(np.int64) * 512
    flash.wait(flash.submit(blocks, np.full(2048, 512), memory, random.permutation(blocks)))
    two = [flash.submit(blocks, np.full(2048, 512), memory, blocks) for _ in range(3)]
    for submitted in reversed(two):
        flash.wait(submitted)
    assert np.array_equal(memory, file[1])


def test_io_uring_or_one_line(file):
    try:
        flash = Flash(file[0], "io_uring")
    except UserError as error:
        assert "--io" in str(error)
    else:
        assert flash.io == "io_uring"
        flash.close()


def test_missing_file(tmp_path):
    with pytest.raises(FormatError, match="No such file"):
        Flash(tmp_path / "none")


def test_the_files_last_bytes(tmp_path):
    """A direct read of them asks for more than there are; of a file that was cut it fails."""
    path, random = tmp_path / "x", np.random.default_rng(0)
    for size in (1, 511, 4097, 70_001, (1 << 20) + 3):
        raw = random.bytes(size)
        path.write_bytes(bytes(4096) + raw)
        for twin in kernels.TWINS.values():
            for threads in (0, 3):
                with open(path, "rb") as file:
                    try:
                        reader = twin["Reader"](threads)
                    except OSError:
                        continue
                    memory = aligned_bytes(2 << 20)
                    reads = [np.array([n], dtype=np.int64) for n in (4096, len(memory), 0)]
                    where = file.fileno(), 4096 + size
                    reader.submit(*where, *reads[:2], memory, reads[2]).wait()
                    assert bytes(memory[:size]) == raw
        (tmp_path / "y").write_bytes(bytes(4096))
        for io in ("auto", "threads", "buffered"):
            flash = Flash(tmp_path / "y", io, sources={path: 4096 + size})
            memory = aligned_bytes(2 << 20)
            try:
                begin, length, skip = flash.span(FILE_BYTES + 4096, size)
                flash.wait(flash.submit_range(begin, length, memory))
                assert bytes(memory[skip : skip + size]) == raw
                os.truncate(path, 4096 + size // 2)
                with pytest.raises(FormatError, match="the file ends before"):
                    flash.wait(flash.submit_range(begin, length, memory))
            finally:
                flash.close()
            path.write_bytes(bytes(4096) + raw)
