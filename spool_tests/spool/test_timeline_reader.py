"""How a timeline is read: from any offsets on, and whatever is in the file."""

import os
import random

import pytest

from chaperone.spool import timeline
from chaperone.spool.timeline import File, Reader
from spool_tests.support.timelines import pieces

pytestmark = pytest.mark.once

STREAMS = ("stdout", "stderr")


@pytest.fixture
def file(tmp_path):
    fd = os.open(tmp_path / "timeline", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    yield fd
    os.close(fd)


def some_lines(seed, count, holes=0.0):
    """Lines of both streams: (stream, offset, end, ms), and the ends of the streams."""
    r = random.Random(seed)
    ends, ms, found = {"stdout": 0, "stderr": 0}, 1_764_130_000_000, []
    for _ in range(count):
        stream = r.choice(("stdout", "stdout", "stdout", "stderr"))
        ms += r.randrange(3)
        offset = ends[stream] + (r.randrange(1, 50) if r.random() < holes else 0)
        ends[stream] = offset + r.randrange(1, 100_000)
        found.append((stream, offset, ends[stream], ms))
    return found, ends


def text_of(lines):
    numbers = {"stdout": 1, "stderr": 2}
    return b"".join(
        b"%d %d %d %d\n" % (ms, numbers[stream], offset, end - offset)
        for stream, offset, end, ms in lines
    )


def read(fd, offsets, ends):
    """All pieces from some offsets on, as (stream, offset, end, ms)."""
    lines, reader, offsets, found = File(fd), Reader(), dict(offsets), []
    reader.begin(lines, {stream: at for stream, at in offsets.items() if at < ends[stream]})
    while (piece := reader.piece(lines, offsets, ends.__getitem__)) is not None:
        stream, end, ms = piece
        found.append((stream, offsets[stream], end, ms))
        offsets[stream] = end
    return found


@pytest.mark.parametrize("count", [1, 50, 9_000])
@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_pieces_are_the_same_from_any_offsets(file, count, holes):
    lines, ends = some_lines(count, count, holes)
    os.write(file, text_of(lines))
    r = random.Random(count)
    for _ in range(20):
        # As one who followed has come: all that came before some line, and a part of that.
        last = r.randrange(count)
        offsets = {s: max((e for t, _, e, _ in lines[:last] if t == s), default=0) for s in STREAMS}
        offsets[lines[last][0]] = r.randrange(offsets[lines[last][0]], lines[last][2] + 1)
        assert read(file, offsets, ends) == pieces(lines, offsets)
    for offsets in ({"stdout": 0, "stderr": 0}, {"stderr": ends["stderr"] // 2}, dict(ends)):
        assert read(file, offsets, ends) == pieces(lines, offsets)


def test_streams_that_are_at_different_lines_lose_nothing(file):
    lines, ends = some_lines("apart", 9_000)
    os.write(file, text_of(lines))
    for offsets in ({"stdout": 5, "stderr": ends["stderr"] - 1}, {"stdout": 9, "stderr": 0}):
        assert read(file, offsets, ends) == pieces(lines, offsets)


def test_reader_takes_what_is_appended_and_waits_for_the_end_of_a_line(file):
    lines, ends = some_lines("live", 30)
    reader, offsets, found = Reader(), dict.fromkeys(STREAMS, 0), []
    written = File(file)
    reader.begin(written, {})
    for byte in text_of(lines):
        os.write(file, bytes([byte]))
        while (piece := reader.piece(written, offsets, ends.__getitem__)) is not None:
            assert byte == ord("\n")
            found.append((piece[0], offsets[piece[0]], *piece[1:]))
            offsets[piece[0]] = piece[1]
    assert found == lines


WHOLE = b"1764130000000 1 0 5\n"
ODD = {
    "nothing": b"\n",
    "half a line": b"1764130000001 1\n",
    "one word more": b"1764130000001 1 0 5 5\n",
    "another stream": b"1764130000001 3 0 5\n",
    "a stream by name": b"1764130000001 stdout 0 5\n",
    "a negative offset": b"1764130000001 1 -1 5\n",
    "no bytes": b"1764130000001 1 5 0\n",
    "other digits": "1764130000001 1 5 ٣\n".encode(),
    "a year that no calendar has": b"253402300800000 1 5 3\n",
    "a huge number": b"1764130000001 1 5 " + b"9" * 5_000 + b"\n",
    "a line without an end": b"x" * 200_000 + b"\n",
    "numbers without an end": b"1 " * 100_000 + b"\n",
    "zeros": bytes(5_000),
    "bytes that are not there": b"1764130000001 1 100 5\n",
    "bytes that were read": b"1764130000001 1 0 3\n",
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_line_of_another_form_is_passed_over(file, odd):
    more = b"" if odd.endswith(b"\n") else b"\n"
    os.write(file, WHOLE + odd + more + b"1764130000002 1 5 3\n" + b"1764130000003 1 8")
    ends = {"stdout": 8, "stderr": 0}
    first = ("stdout", 0, 5, 1_764_130_000_000), ("stdout", 5, 8, 1_764_130_000_002)
    assert read(file, {"stdout": 0, "stderr": 0}, ends) == [*first]
    assert read(file, {"stdout": 5, "stderr": 0}, ends) == [first[1]]


def test_line_is_cut_where_its_stream_ends(file):
    os.write(file, b"1764130000000 1 0 500\n")
    assert read(file, {"stdout": 2}, {"stdout": 5}) == [("stdout", 2, 5, 1_764_130_000_000)]


def test_end_of_a_long_timeline_is_found_without_reading_all_of_it(file, monkeypatch):
    lines, ends = some_lines("long", 9_000)
    os.write(file, text_of(lines))
    blocks, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *of: (blocks.append(of), pread(*of))[1])
    last = {stream: ends[stream] - 1 for stream in STREAMS}
    assert read(file, last, ends) == pieces(lines, last)
    assert len(blocks) <= 3


def test_time_is_as_in_rfc_3339():
    assert timeline.timestamp(1_764_130_000_007) == "2025-11-26T04:06:40.007Z"
    assert timeline.timestamp(0) == "1970-01-01T00:00:00.000Z"
    assert timeline.timestamp(timeline.LATEST_MS) == "9999-12-31T23:59:59.999Z"
