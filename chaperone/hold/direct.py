"""
A run without a spool: the program's output goes to our stdout and stderr, and its final status
stays in memory.

Knows: fds 1 and 2.  Must not know: files, processes.
"""

from __future__ import annotations

import os
import select
import sys
import time

from ..cpython import signal, stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..program.guard import Guard
    from .chaperone import Chaperone

# How long we wait for the reader of our output after the program was stopped and is gone.
PATIENCE_S = 1.0
LAST_LINES_MS = 100  # how long a reader has to take the last lines of the log
_STOPPING = (int(signal.SIGTERM), int(signal.SIGINT))
LINES_BYTES = 65_536  # of the log, kept while stderr has no room


_OURS = {"stdout": 1, "stderr": 2}


class DirectRun:
    """
    What `chaperone exec` has in place of a `RunDirectory`.

    Attributes:
        final (dict): The final status; None until the program has ended.
    """

    def __init__(self, run_id: str, key: str) -> None:
        self.run_id, self.key = run_id, key
        self.streams = {"stdout": _without_waiting(1), "stderr": _without_waiting(2)}
        self._lines = b""
        self.control_fd = self.spool_fd = -1
        self.path, self.log_path = "", "/dev/stderr"
        self.final: dict[str, Any] | None = None
        self.started_at: float | None = None

    def hand_to(self, guard: Guard, max_bytes: int | None) -> None:
        """Give the guard our streams, so that it can go on if this chaperone dies."""
        guard.take_run([*_OURS.values(), 2], max_bytes)

    def open_stream(self, stream: str) -> int:
        """One more fd of a stream, in blocking mode, for the program; the caller closes it."""
        return os.dup(_OURS[stream])

    def size_of(self, stream: str) -> int:
        """Unlimited: no file has the bytes, so none can be truncated."""
        return sys.maxsize

    def tell(self, line: bytes) -> bool:
        """Write a line to stderr, which is the log; without room there, with the next line."""
        self._lines = (self._lines + line)[:LINES_BYTES]
        self._write_lines()
        return True

    def _write_lines(self, patience_ms: float = 0) -> None:
        poll = select.poll()
        poll.register(self.streams["stderr"], select.POLLOUT)
        try:
            while self._lines and poll.poll(patience_ms):
                piece = self._lines[: select.PIPE_BUF]
                self._lines = self._lines[os.write(self.streams["stderr"], piece) :]
        except BlockingIOError:
            pass
        except OSError:
            self._lines = b""

    def is_there(self) -> bool:
        """Always true: there is no run directory."""
        return True

    is_in_place = is_there

    def replace_running(self, status: dict[str, Any]) -> str | None:
        """No-op: there is no running.json."""
        return None

    def publish(self, status: dict[str, Any], durable: bool = False) -> None:
        """Keep the final status for the caller."""
        self.final = status

    def end(self, durable: bool = False) -> None:
        """No-op: there are no files to delete."""

    def close(self) -> None:
        """Write the last lines; fds 1 and 2 stay open."""
        self._write_lines(LAST_LINES_MS)
        for name, fd in self.streams.items():
            if fd != _OURS[name]:
                os.close(fd)

    def mark_start(self, monotonic_s: float) -> None:
        """No-op: a direct run can't be adopted."""

    def touch(self) -> None:
        """No-op: there is no lock whose times could record it."""


def _without_waiting(fd: int) -> int:
    """
    A pipe or a terminal, opened a second time so that a write never waits. O_NONBLOCK on our own fd
    would also affect each process that shares it, such as the caller's shell. The same fd if it
    can't be opened: a socket, no /proc, or a terminal of another user.
    """
    if not (stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd)):
        return fd
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return fd


def see_off(chaperone: Chaperone) -> None:
    """
    Wait until the output of a program that has ended is read, as the end of any writer into a full
    pipe waits. Once it is stopped, or by a signal now, it waits no longer than its reader is slow.
    """
    is_stopped = chaperone.status["stop"] is not None
    last = time.monotonic()
    while waiting := [stream for stream in chaperone.streams.values() if stream.waiting]:
        poll = select.poll()
        for stream in waiting:
            poll.register(stream.fd, select.POLLOUT)
        poll.register(chaperone.signal_fd, select.POLLIN)
        left_s = last + PATIENCE_S - time.monotonic() if is_stopped else None
        if left_s is not None and left_s <= 0:
            for stream in waiting:
                stream.give_up()
            return
        ready = [fd for fd, _ in poll.poll(None if left_s is None else left_s * 1000 + 1)]
        if chaperone.signal_fd in ready:
            came = os.read(chaperone.signal_fd, 512)
            if not is_stopped and any(number in came for number in _STOPPING):
                is_stopped, last = True, time.monotonic()
        for stream in waiting:
            if stream.fd in ready:
                last = time.monotonic()
                stream.flush()
