"""
The timeline of a run: when the bytes of its streams arrived. It has a line for the bytes of a
stream that were read within a millisecond. A run has one if its spec asks for it.

Knows: the form of a line, clocks.  Must not know: processes, what reads or writes streams.
"""

from __future__ import annotations

import os
import time

from ..model import status as statuses
from . import format

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Protocol

    from ..program.loop import Loop
    from ..program.streams import Stream

    class Lines(Protocol):
        """A timeline that is read, wherever it is."""

        def size(self) -> int: ...
        def read(self, size: int, offset: int) -> bytes: ...

    Line = tuple[str, int, int, int]  # the stream, offset, end, milliseconds since the epoch
    Piece = tuple[str, int, int | None]


NUMBERS = {stream: number for number, stream in enumerate(format.STREAMS, 1)}  # as fds have them
# How long a reader waits for a line, which comes 1 or 2 ms after its bytes. After that, the disk
# has refused it; or the host is busy, or the chaperone was stopped, and the line comes later.
LINE_S = 0.1
LINE_BYTES = 80  # more than the largest numbers take
BLOCK = 65_536  # bytes that a reader takes at once: some 2,000 lines
LATEST_MS = 253_402_300_799_999  # the end of the year 9999, the last that RFC 3339 can show


class Timeline:
    """
    The timeline of a run, as its chaperone writes it.

    The bytes of a stream are written first, then the line about them, so that a line is never about
    missing bytes. A line that the disk refuses is dropped; the streams are not harmed, and the time
    of those bytes is unknown.

    Args:
        fd (int): For reading and writing, O_APPEND; `close` closes it.
        loop (Loop): Calls when no bytes arrive that would end a millisecond.
        report: Called with a sentence when lines begin to be dropped, and when that is over.
    """

    def __init__(self, fd: int, loop: Loop, report: Callable[[str], None]) -> None:
        self.fd = fd
        self._loop, self._report = loop, report
        self._ms = 0
        self._gathered: dict[int, list[int]] = {}  # of this millisecond: offset and length
        self._dropped = 0  # bytes that no line is about, since the disk last took a line
        # A chaperone that was killed, or a full disk, may have left half a line.
        size = os.fstat(fd).st_size
        self._is_torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"

    def hear(self, streams: Mapping[str, Stream]) -> None:
        """Record everything that is written to these streams from now on."""
        for name, stream in streams.items():
            stream.accepted = self._recorder(NUMBERS[name])

    def _recorder(self, number: int) -> Callable[[int, int], None]:
        gathered = self._gathered

        def record(offset: int, count: int) -> None:
            ms = time.time_ns() // 1_000_000
            if ms != self._ms:
                self._begin(ms)
            line = gathered.get(number)
            if line is None:
                gathered[number] = [offset, count]
            else:
                line[1] += count

        return record

    def _begin(self, ms: int) -> None:
        self.flush()
        self._ms = ms
        self._loop.when_quiet(self.flush)

    def flush(self) -> None:
        """Write what was gathered."""
        for number, (offset, count) in self._gathered.items():
            self._write(b"%d %d %d %d\n" % (self._ms, number, offset, count), count)
        self._gathered.clear()
        self._ms = 0

    def _write(self, line: bytes, count: int) -> None:
        """Append a line about `count` bytes; if the file ends with half a line, end that first."""
        data = b"\n" + line if self._is_torn else line
        written = 0
        try:
            while written < len(data):
                written += os.write(self.fd, data[written:])
        except OSError as error:
            if written:
                self._is_torn = data[written - 1 : written] != b"\n"
            if not self._dropped:
                self._report(f"timeline: lines are dropped from now on: {error.strerror}")
            self._dropped += count
            return
        self._is_torn = False
        self._report_dropped("the disk takes lines again")

    def _report_dropped(self, why: str) -> None:
        if self._dropped:
            self._report(f"timeline: lines about {self._dropped} bytes were dropped, {why}")
            self._dropped = 0

    def end(self) -> None:
        """No more bytes will come: write what was gathered, and report dropped lines."""
        self.flush()
        self._report_dropped("the run has ended")

    def close(self) -> None:
        """Write what was gathered, and close the file."""
        self.flush()
        os.close(self.fd)


def kept(
    run_fd: int, streams: Mapping[str, Stream], loop: Loop, report: Callable[[str], None]
) -> Timeline | None:
    """A run's timeline, written from now on; None if it can't be opened: the run goes on then."""
    try:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        fd = format.open_plain(run_fd, format.TIMELINE, flags)
    except OSError as error:
        report(f"timeline: no line is written: {error}")
        return None
    timeline = Timeline(fd, loop, report)
    timeline.hear(streams)
    return timeline


# -- reading it


class File:
    """
    A timeline on this host.

    Args:
        fd (int): For reading; it stays the caller's.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def size(self) -> int:
        """How many bytes it has now."""
        return os.fstat(self._fd).st_size

    def read(self, size: int, offset: int) -> bytes:
        """Bytes that are there, without waiting; fewer, or none, if there are no more."""
        return os.pread(self._fd, size, offset)


class Reader:
    """
    Reads the timeline of a run, from some offsets on, in the order in which the bytes arrived. It
    keeps no file open: each call gets the lines.
    """

    def __init__(self) -> None:
        self._at = 0
        self._lines: list[Line] = []  # of the block before `_at`; the next one is the last

    def begin(self, lines: Lines, offsets: Mapping[str, int]) -> None:
        """
        Find where to begin. It searches backwards: the end of a long timeline is found without
        reading the rest.

        Args:
            offsets (dict): For each stream to read, the offset of its first byte.
        """
        sought = dict(offsets)
        self._at = lines.size()
        while self._at and sought:
            start = max(0, self._at - BLOCK)
            text = lines.read(self._at - start, start)
            # If the block begins inside a line, the rest of it may look like a whole line.
            cut = text.find(b"\n") + 1 if start else 0
            for stream, offset, _, _ in _parsed(text[cut : text.rfind(b"\n") + 1]):
                if offset <= sought.get(stream, -1):
                    del sought[stream]
            self._at = start + cut if cut < len(text) else start

    def piece(
        self, lines: Lines, offsets: Mapping[str, int], size_of: Callable[[str], int]
    ) -> Piece | None:
        """
        Which bytes come next, and when they arrived.

        Args:
            offsets (dict): For each stream that is read, up to which byte it was delivered.
            size_of: Called with a stream; returns up to which byte it may be read.
        Returns:
            tuple: The stream, the end of these bytes, and when they arrived, in milliseconds since
                the epoch; that is None if no line is about them. None if there is no line yet.
        """
        while True:
            while self._lines:
                stream, offset, end, ms = self._lines[-1]
                at = offsets.get(stream)
                if at is not None:
                    # A power failure may have kept a line and lost its bytes.
                    end = min(end, size_of(stream))
                    if end > max(at, offset):
                        return (stream, offset, None) if at < offset else (stream, end, ms)
                self._lines.pop()
            if not self._take_block(lines):
                return None

    def _take_block(self, lines: Lines) -> bool:
        """Read the next whole lines; False if there are none."""
        text = lines.read(BLOCK, self._at)
        size = text.rfind(b"\n") + 1
        if not size and len(text) == BLOCK:  # damage: no line is that long
            size = BLOCK
        self._at += size
        self._lines = _parsed(text[:size])
        self._lines.reverse()
        return size > 0


class Timed:
    """
    Which bytes of a run with a timeline to deliver next, while the run goes on. Bytes without a
    line are delivered when their line can't come any more, or has taken too long.

    Attributes:
        again_s (float): After `piece` returned None: after how many seconds to call it again even
            if nothing happens; 0 if that is not needed.
    """

    def __init__(self) -> None:
        self._reader = Reader()
        self._has_begun = False
        self._due = 0.0
        self._awaited: dict[str, int] = {}  # up to where bytes have no line when that is due
        self.again_s = 0.0

    def piece(
        self,
        lines: Lines,
        offsets: Mapping[str, int],
        size_of: Callable[[str], int],
        is_over: bool,
    ) -> Piece | None:
        """
        The next bytes to deliver.

        Args:
            lines, offsets, size_of: As for `Reader.piece`.
            is_over (bool): Whether no more lines will come.
        Returns:
            tuple: As from `Reader.piece`; None if there are none, or they wait for their line.
        """
        if not self._has_begun:
            self._has_begun = True
            self._reader.begin(lines, {s: at for s, at in offsets.items() if at < size_of(s)})
        found = self._reader.piece(lines, offsets, size_of)
        return found or self._without_line(offsets, size_of, is_over)

    def _without_line(
        self, offsets: Mapping[str, int], size_of: Callable[[str], int], is_over: bool
    ) -> Piece | None:
        self.again_s = 0.0
        now = time.monotonic()
        is_due = 0 < self._due <= now
        sizes = {stream: size_of(stream) for stream in offsets}
        for stream, at in offsets.items():
            due = self._awaited.get(stream, 0) if is_due else 0
            end = sizes[stream] if is_over else min(due, sizes[stream])
            if end > at:
                return stream, end, None
        if is_due:
            self._due = 0.0
        if not self._due and any(sizes[stream] > at for stream, at in offsets.items()):
            self._due, self._awaited, self.again_s = now + LINE_S, sizes, LINE_S
        return None


_STREAMS = {b"%d" % number: stream for stream, number in NUMBERS.items()}


def _parsed(text: bytes) -> list[Line]:
    """The valid lines of a text."""
    found = []
    for line in text.split(b"\n"):
        words = line.split(b" ")
        # We write no longer numbers, and int() refuses those with thousands of digits.
        if len(words) != 4 or words[1] not in _STREAMS or len(line) > LINE_BYTES:
            continue
        if words[0].isdigit() and words[2].isdigit() and words[3].isdigit():
            ms, offset, length = int(words[0]), int(words[2]), int(words[3])
            if ms <= LATEST_MS:
                found.append((_STREAMS[words[1]], offset, offset + length, ms))
    return found


def timestamp(ms: int) -> str:
    """Milliseconds since the epoch as RFC 3339 has them: `2026-11-26T04:09:21.123Z`."""
    return f"{statuses.timestamp(ms * 1_000_000)[:-4]}Z"
