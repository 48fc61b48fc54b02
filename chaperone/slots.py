"""
Slots for connecting: at most so many connection attempts to one host at a time, across all chaperones of a spool.

Knows: locks in a directory of the spool.  Must not know: ssh, how long a connection takes.
"""

from __future__ import annotations

import fcntl
import os

from . import spool

# sshd's default MaxStartups begins to refuse at 10: of 100 at once 34-42 failed, of 100 eight at a time none.
SLOTS = 8


def slot_names(host: str) -> list[str]:
    """The file names of a host's slots; what no file name may hold is escaped, and what is long is cut: hosts may share slots."""
    safe = "".join(char if char.isascii() and (char.isalnum() or char in "-_.") else f"%{ord(char):02x}" for char in host)
    return [f"{safe[:200]}.{number}" for number in range(SLOTS)]


def open_slots(spool_fd: int) -> int:
    """The spool's directory for slots, made if it is not there; the caller closes it."""
    spool.make_directory(spool.CONNECT, spool_fd)
    return spool.open_entries(spool_fd, spool.CONNECT)


def take(directory_fd: int, host: str) -> int | None:
    """
    Take a slot, if one is free.

    Args:
        directory_fd (int): Of the spool's directory for slots.
        host (str): Whatever tells hosts apart.
    Returns:
        int: An fd: the slot is free again when it is closed, or its holder dies. None if all are taken.
    """
    for name in slot_names(host):
        fd = spool.open_plain(directory_fd, name, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            os.close(fd)
    return None
