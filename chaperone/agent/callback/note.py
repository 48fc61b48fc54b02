"""
What an agent notes in a run directory: which requests it has taken, that all was acknowledged.

Knows: the file `callback`.  Must not know: HTTP, what a request does.
"""

from __future__ import annotations

import os

from ...spool import format, locks


class Note:
    """
    The file `callback` of a run: lines that are appended, and the lock of the process that posts.

    Args:
        run_fd (int): Of the run directory; the caller keeps it open.
    Attributes:
        seq (int): The number of the last request that was taken.
        is_done (bool): Whether the receiver has acknowledged the final status.
    Raises:
        SpoolError: If the file can't be opened.
    """

    def __init__(self, run_fd: int) -> None:
        self._fd = format.open_plain(run_fd, format.CALLBACK, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.seq = 0
        self.is_done = False

    def __enter__(self) -> Note:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def take(self) -> bool:
        """
        Lock the note, and read it; without waiting, and until it is closed.

        Returns:
            bool: False if another process posts the run.
        """
        if not locks.try_take(self._fd):
            return False
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            lines = file.read().split(b"\n")
        # Behind the last newline is what a process that was killed could not finish.
        for word, _, number in (line.partition(b" ") for line in lines[:-1]):
            if word == b"request" and number.isdigit():
                self.seq = max(self.seq, int(number))
            self.is_done |= word == b"completed"
        if lines[-1]:
            os.write(self._fd, b"\n")
        return True

    def took(self, seq: int) -> None:
        """Note a request: it is never taken again, not even after a power failure."""
        self._append(f"request {seq}\n")
        self.seq = seq

    def done(self) -> None:
        """Note that the receiver has everything."""
        self._append("completed\n")
        self.is_done = True

    def _append(self, line: str) -> None:
        try:
            os.write(self._fd, line.encode())
            os.fdatasync(self._fd)
        except OSError as error:
            raise format.failure(f"write {format.CALLBACK!r}", error) from error
