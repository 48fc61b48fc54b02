"""
How many attempts to connect to one host there are at a time.

Knows: files and locks of a spool.  Must not know: what an attempt does.
"""

from __future__ import annotations

import os

from ...program.fds import owned
from ...spool import format, locks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...program.interface import Caller

# sshd's default MaxStartups begins to refuse at 10: of 100 at once 34-42 failed, of 100 eight at a
# time none.
SLOTS = 8


class Slots:
    """
    Leave to connect: at most so many attempts to one host at a time, across all chaperones of a
    spool. A slot is a lock in the spool, and is free again when its holder dies.

    Args:
        chaperone (Caller): For its spool and log.
        name (str): What the attempts that share a limit have in common; None for no limit.
    """

    def __init__(self, chaperone: Caller, name: str | None) -> None:
        self._chaperone, self._name = chaperone, name
        self._fds: list[int] = []  # one, while we connect; all, while we wait for one

    def take(self) -> bool:
        """Take a slot, if one is free, until `leave`."""
        if self._name is None or self._chaperone.spool_fd < 0:
            return True
        try:
            # Kept open while we wait: a look at them takes 7 µs then, and 40 where they are opened
            # each time; a hundred may wait.
            self._fds = self._fds or _open_slots(self._chaperone.spool_fd, self._name)
            return self._take_one()
        except OSError as error:  # a limit that can't be kept is no reason not to run
            self.leave()
            reason = error.strerror or error
            self._chaperone.log(
                f"unable to take a connection slot: {reason}; connecting without one"
            )
            return True

    def _take_one(self) -> bool:
        for fd in self._fds:
            if locks.try_take(fd):
                self._fds.remove(fd)
                self.leave()
                self._fds = [fd]
                return True
        return False

    def leave(self) -> None:
        """Let go of the slot, or of waiting for one."""
        while self._fds:
            os.close(self._fds.pop())


def slot_names(name: str) -> list[str]:
    """
    The file names of slots; what no file name may hold is escaped, and what is long is cut: hosts
    may share slots.
    """
    safe = "".join(
        char if char.isascii() and (char.isalnum() or char in "-_.") else f"%{ord(char):02x}"
        for char in name
    )
    return [f"{safe[:200]}.{number}" for number in range(SLOTS)]


def _open_slots(spool_fd: int, name: str) -> list[int]:
    """
    Open slots, to be asked for one until it is free.

    Raises:
        OSError: If they can't be opened; none of them stays open.
    """
    format.make_directory(format.CONNECT, spool_fd)
    fds: list[int] = []
    with owned(format.open_entries(spool_fd, format.CONNECT)) as directory_fd:
        try:
            for slot in slot_names(name):
                fds.append(format.open_plain(directory_fd, slot, os.O_RDWR | os.O_CREAT))
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
    return fds
