"""
A program's bytes on their way into the spool: counted, limited, dropped on a full disk, never
blocking the program.

Knows: file descriptors, pipes.  Must not know: which program writes, or file names.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time

from .fds import PIPE_BYTES, widened

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop

# Of one read: it stays in a core's cache. Measured in turns: 0.59x of `prog > file`, 0.51x with 1
# MiB, 0.41x with 64 KiB
BUFFER_BYTES = 262_144


class Stream:
    """
    Where one stream goes.

    Args:
        fd (int): O_APPEND, or anything that can be written to; stays the caller's.
        max_bytes (int): How much is kept, from the first byte on; None for all.
        told: Called with a sentence when bytes begin to be dropped, and when a full disk takes them
            again.
        full: Called once, when the first byte is dropped.
        loop (Loop): Watches an fd that has a reader, which may be slow; a file needs none.

    Attributes:
        bytes (int): Written so far, and before us by an earlier chaperone of this run.
        waiting (bytearray): What a slow reader has no room for now; of a file nothing.
        dropped (int): Not written, for the limit or because the disk refused them.
        heard_at (float): When the last byte came, in seconds on the monotonic clock; 0 before the
            first.
        accepted: Called with the offset and the number of bytes that were just written; None for
            a stream whose run keeps no timeline.
    """

    def __init__(
        self,
        fd: int,
        max_bytes: int | None,
        told: Callable[[str], None],
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
        self._told, self._full = told, full
        self._refused = 0  # dropped by the disk since it last took a byte

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """
        Append, or count as dropped; never raises for what the disk does.

        The limit keeps the head. A full disk makes a hole: when it has room again later bytes are
            kept, for the
        last lines of a run are worth more than the order of a stream that has lost some already;
        `log` tells where.
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
        """Write without waiting: what has no room now."""
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
        return os.write(self.fd, view[: select.PIPE_BUF])  # for which poll(2) has seen room

    # -- a slow reader

    @property
    def taken(self) -> int:
        """How many bytes came, written or not."""
        return self.bytes + self.dropped + len(self.waiting)

    def is_full(self, freed: Callable[[], None]) -> bool:
        """Whether enough waits; then `freed` is called, once, when nothing does any more."""
        full = len(self.waiting) >= BUFFER_BYTES
        if full:
            self._freed = freed
        return full

    def flush(self) -> None:
        """Write what waits, as far as there is room."""
        waiting, self.waiting = self.waiting, bytearray()
        self.waiting += self._put(memoryview(waiting))
        if not self.waiting:
            self._free()

    def give_up(self) -> None:
        """Drop what waits: its reader takes nothing."""
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
            self._told(
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
            self._told(f"bytes are dropped from offset {self.bytes} on: {why}")
            self._full()


def _do_nothing() -> None:
    """No source has been stopped."""


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
        self._buffer = bytearray()  # made at the first byte: an idle run does not pay for it
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
        """Move what one read gets; 0 when nothing is there or the pipe has ended."""
        if len(self._buffer) < min(self._capacity, BUFFER_BYTES):
            self._buffer = bytearray(min(self._capacity, BUFFER_BYTES))
        try:
            count = os.readv(self._fd, [self._buffer])
        except BlockingIOError:
            return 0
        if not count:
            self.close()
            return 0
        self._stream.write(memoryview(self._buffer)[:count])
        if count == PIPE_BYTES == self._capacity:
            self._capacity = widened(self._fd)
        return count

    def drain(self) -> None:
        """
        Read what the pipe holds now, at most its capacity: a writer left alone must not hold us.
        """
        left = max(self._capacity, PIPE_BYTES)
        while self._fd >= 0 and left > 0:
            count = self._read()
            left -= count
            if not count:
                break

    def close(self) -> None:
        """Let go of the pipe."""
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1
