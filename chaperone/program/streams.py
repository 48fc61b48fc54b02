"""
The output of a program on its way into the spool. It is counted and limited; on a full disk it is
dropped; it never blocks the program.

Knows: file descriptors, pipes.  Must not know: which program writes, or file names.
"""

from __future__ import annotations

import errno
import select
import time

from ..cpython import os, stat
from .fds import PIPE_BYTES, widened

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop

# Bytes of one read: they stay in a core's cache. Measured in turns, as throughput of `prog > file`:
# 0.59 with 256 KiB, 0.51 with 1 MiB, 0.41 with 64 KiB.
BUFFER_BYTES = 262_144
# Bytes of the first reads: most programs write little, and a larger buffer takes all of its pages.
FIRST_BYTES = 4_096


class Stream:
    """
    Where the bytes of one stream are written.

    Args:
        fd (int): A file with O_APPEND, or anything that can be written to; the caller closes it.
        max_bytes (int): How many bytes are kept, from the first one on; None for all.
        report: Called with a sentence when bytes begin to be dropped, and when a full disk takes
            bytes again.
        full: Called once, when the first byte is dropped.
        loop (Loop): Watches an fd whose reader may be slow; a file needs none.

    Attributes:
        bytes (int): Written so far, with those of an earlier chaperone of this run.
        waiting (bytearray): Bytes that a slow reader has no room for now; a file never has any.
        dropped (int): Bytes that were not written, because of the limit or because the disk refused
            them.
        heard_at (float): When the last byte arrived, in seconds on the monotonic clock; 0 before
            the first one.
        accepted: Called with the offset and the number of bytes that were just written; None for
            a stream whose run keeps no timeline.
    """

    def __init__(
        self,
        fd: int,
        max_bytes: int | None,
        report: Callable[[str], None],
        full: Callable[[], None],
        loop: Loop | None = None,
    ) -> None:
        found = os.fstat(fd)
        is_file = stat.S_ISREG(found.st_mode)
        self.fd = fd
        self.bytes = found.st_size if is_file else 0
        self.waiting = bytearray()
        self._loop = loop
        self._freed: Callable[[], None] = _do_nothing
        self._may_block = not is_file and os.get_blocking(fd)
        self.dropped = 0
        self.heard_at = 0.0
        self.accepted: Callable[[int, int], None] | None = None
        self._max_bytes = max_bytes
        self._report, self._full = report, full
        self._refused = 0  # dropped by the disk since it last took a byte

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """
        Append bytes, or count them as dropped; an error of the disk raises nothing.

        The limit keeps the first bytes. A full disk makes a hole: later bytes are kept as soon as
        there is room again, because the last lines of a run are worth more than an unbroken
        beginning. The log says where the hole is.
        """
        self.heard_at = time.monotonic()
        view = memoryview(data)
        room = len(view)
        if self._max_bytes is not None:
            room = max(0, self._max_bytes - self.bytes - len(self.waiting))
        kept, over = view[:room], len(view) - room
        if kept and not self.waiting:
            kept = self._put(kept)
        if kept:
            self.waiting += kept
            if self._loop is not None:
                self._loop.watch(self.fd, select.POLLOUT, lambda fd, events: self.flush())
        if over > 0:
            self._drop(over, f"its limit of {self._max_bytes} bytes is reached")

    def _put(self, view: memoryview) -> memoryview:
        """Write without waiting; returns the bytes that there is no room for now."""
        while view:
            try:
                count = self._ask_and_write(view) if self._may_block else os.write(self.fd, view)
            except BlockingIOError:
                return view
            except OSError as error:
                self._refuse(len(view), error)
                break
            self._accept(count)
            view = view[count:]
        return view[:0]

    def _ask_and_write(self, view: memoryview) -> int:
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        if not poll.poll(0):
            raise BlockingIOError
        return os.write(self.fd, view[: select.PIPE_BUF])  # poll(2) has seen room for these

    # -- a slow reader

    @property
    def taken(self) -> int:
        """How many bytes arrived, written or not."""
        return self.bytes + self.dropped + len(self.waiting)

    def is_full(self, freed: Callable[[], None]) -> bool:
        """Whether too many bytes wait; if so, `freed` is called once, when none wait any more."""
        full = len(self.waiting) >= BUFFER_BYTES
        if full:
            self._freed = freed
        return full

    def flush(self) -> None:
        """Write the waiting bytes, as many as there is room for."""
        waiting, self.waiting = self.waiting, bytearray()
        self.waiting += self._put(memoryview(waiting))
        if not self.waiting:
            self._free()

    def give_up(self) -> None:
        """Drop the waiting bytes: the reader takes none."""
        count, self.waiting = len(self.waiting), bytearray()
        self._free()
        self._drop(count, "its reader takes nothing")

    def _free(self) -> None:
        if self._loop is not None:
            self._loop.unwatch(self.fd)
        freed, self._freed = self._freed, _do_nothing
        freed()

    def _accept(self, count: int) -> None:
        if self._refused:
            self._report(
                f"{self._refused} bytes were dropped at offset {self.bytes}; "
                "the disk takes bytes again"
            )
            self._refused = 0
        if self.accepted is not None:
            self.accepted(self.bytes, count)
        self.bytes += count

    def _refuse(self, count: int, error: OSError) -> None:
        self._refused += count
        self._drop(count, error.strerror or errno.errorcode.get(error.errno or 0, "error"))

    def _drop(self, count: int, why: str) -> None:
        first, self.dropped = not self.dropped, self.dropped + count
        if first:
            self._report(f"bytes are dropped from offset {self.bytes} on: {why}")
            self._full()


def _do_nothing() -> None:
    """What `is_full` has to call where no pump was stopped."""


class Pump:
    """
    The read end of a pipe, read into a stream whenever it has bytes.

    Args:
        loop (Loop): Watches the pipe.
        fd (int): The read end; closed by `close`, or when the pipe ends.
        stream (Stream): Takes the bytes.
    """

    def __init__(self, loop: Loop, fd: int, stream: Stream) -> None:
        self._loop, self._fd, self._stream = loop, fd, stream
        self._capacity = PIPE_BYTES
        self._buffer = bytearray()  # made at the first read: an idle run does not pay for it
        os.set_blocking(fd, False)
        self._watch()

    @property
    def fd(self) -> int:
        """The read end, or -1 when it is closed."""
        return self._fd

    def _ready(self, fd: int, events: int) -> None:
        self._read()
        # A full pipe makes the program wait, as it would without us.
        if self._fd >= 0 and self._stream.is_full(self._watch):
            self._loop.unwatch(self._fd)

    def _watch(self) -> None:
        if self._fd >= 0:
            self._loop.watch(self._fd, select.POLLIN, self._ready)

    def _read(self) -> int:
        """Move the bytes of one read, and count them; 0 if there are none or the pipe has ended."""
        self._buffer = self._buffer or bytearray(FIRST_BYTES)
        try:
            count = os.readv(self._fd, [self._buffer])
        except BlockingIOError:
            return 0
        if not count:
            self.close()
            return 0
        self._stream.write(memoryview(self._buffer)[:count])
        if count == len(self._buffer):
            self._grow()
        return count

    def _grow(self) -> None:
        """Read more at a time, as the buffer was full; widen a pipe that filled its buffer."""
        if len(self._buffer) == PIPE_BYTES == self._capacity:
            self._capacity = widened(self._fd)
        size = min(self._capacity, BUFFER_BYTES)
        if len(self._buffer) < size:
            self._buffer = bytearray(size)

    def drain(self) -> None:
        """
        Read what the pipe holds now, at most its capacity: a process that was left running may
        write for ever.
        """
        left = max(self._capacity, PIPE_BYTES)
        while self._fd >= 0 and left > 0:
            count = self._read()
            left -= count
            if not count:
                break

    def close(self) -> None:
        """Close the pipe."""
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1
