"""
The timeline of a run: when the bytes of its streams came, a line for what was read of a stream
within a millisecond. A run has one if its spec asks for it.

Knows: the form of a line, the wall clock.  Must not know: processes, what reads or writes streams.
"""

from __future__ import annotations

import os
import time

from . import format

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..program.loop import Loop
    from ..program.streams import Stream
    from .run_directory import RunDirectory


# How long a line waits for more bytes of its millisecond, if none of a later one come.
GATHER_S = 0.001
NUMBERS = {stream: number for number, stream in enumerate(format.STREAMS, 1)}  # as fds have them


class Timeline:
    """
    The timeline of a run, as its chaperone writes it.

    The bytes of a stream are written first, then the line about them, so that a line never claims
    what is not there. A line that the disk refuses is dropped, and the streams are not harmed: what
    no line is about has no time.

    Args:
        fd (int): O_APPEND, and to be read; becomes its own.
        loop (Loop): Has the deadline by which a line is written.
        told: Called with a sentence when lines begin to be dropped, and when that is over.
    """

    def __init__(self, fd: int, loop: Loop, told: Callable[[str], None]) -> None:
        self.fd = fd
        self._loop, self._told = loop, told
        self._ms = 0
        self._gathered: dict[int, list[int]] = {}  # of this millisecond: offset and length
        self._timer: int | None = None
        self._dropped = 0  # bytes that no line is about, since the disk last took a line
        # A chaperone that was killed, or a full disk, may have left half a line.
        size = os.fstat(fd).st_size
        self._is_torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"

    def hear(self, streams: Mapping[str, Stream]) -> None:
        """Take part in all that is written to these streams from now on."""
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
        self._timer = self._loop.later(GATHER_S, self.flush)

    def flush(self) -> None:
        """Write what was gathered."""
        self._loop.cancel(self._timer)
        for number, (offset, count) in self._gathered.items():
            self._write(b"%d %d %d %d\n" % (self._ms, number, offset, count), count)
        self._gathered.clear()
        self._ms = 0

    def _write(self, line: bytes, count: int) -> None:
        """Append a line about so many bytes, after the end of what may be half a line."""
        data = b"\n" + line if self._is_torn else line
        written = 0
        try:
            while written < len(data):
                written += os.write(self.fd, data[written:])
        except OSError as error:
            if written:
                self._is_torn = data[written - 1 : written] != b"\n"
            if not self._dropped:
                self._told(f"timeline: lines are dropped from now on: {error.strerror}")
            self._dropped += count
            return
        self._is_torn = False
        self._tell_dropped("the disk takes lines again")

    def _tell_dropped(self, why: str) -> None:
        if self._dropped:
            self._told(f"timeline: lines about {self._dropped} bytes were dropped, {why}")
            self._dropped = 0

    def end(self) -> None:
        """No more bytes come: write what was gathered, and count what is missing."""
        self.flush()
        self._tell_dropped("the run has ended")

    def close(self) -> None:
        """Write what was gathered, and close the file."""
        self.flush()
        os.close(self.fd)


def keep(
    run: RunDirectory, streams: Mapping[str, Stream], loop: Loop, told: Callable[[str], None]
) -> None:
    """Write a run's timeline from now on; if that can't be opened, the run goes on without it."""
    try:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        fd = format.open_plain(run.fd, format.TIMELINE, flags)
    except OSError as error:
        told(f"timeline: no line is written: {error}")
        return
    run.timeline = Timeline(fd, loop, told)
    run.timeline.hear(streams)
