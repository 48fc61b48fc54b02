"""
Slots for connecting: at most so many connection attempts to one host at a time, across all
chaperones of a spool.

Knows: locks in a directory of the spool.  Must not know: ssh, how long a connection takes.
"""

from __future__ import annotations

import fcntl
import os

from ..spool import format

# sshd's default MaxStartups begins to refuse at 10: of 100 at once 34-42 failed, of 100 eight at a
# time none.
SLOTS = 8


def slot_names(host: str) -> list[str]:
    """
    The file names of a host's slots; what no file name may hold is escaped, and what is long is
    cut: hosts may share slots.
    """
    safe = "".join(
        char if char.isascii() and (char.isalnum() or char in "-_.") else f"%{ord(char):02x}"
        for char in host
    )
    return [f"{safe[:200]}.{number}" for number in range(SLOTS)]


def opened(spool_fd: int, host: str) -> list[int]:
    """
    Open a host's slots, to be asked for one until it is free.

    Args:
        host (str): Whatever tells hosts apart.
    Returns:
        list: fds, all of the slots.
    Raises:
        OSError: If they can't be opened; none of them stays open.
    """
    format.make_directory(format.CONNECT, spool_fd)
    directory_fd = format.open_entries(spool_fd, format.CONNECT)
    fds: list[int] = []
    try:
        for name in slot_names(host):
            fds.append(format.open_plain(directory_fd, name, os.O_RDWR | os.O_CREAT))
    except OSError:
        leave(fds)
        raise
    finally:
        os.close(directory_fd)
    return fds


def take(fds: list[int]) -> bool:
    """
    Take a slot, if one is free.

    Args:
        fds (list): From `opened`; the slot that was taken is what is left of it.
    Returns:
        bool: False if all are taken. What was taken is free again after `leave`, or when its holder
            dies.
    """
    for fd in fds:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        fds.remove(fd)
        leave(fds)
        fds.append(fd)
        return True
    return False


def leave(fds: list[int]) -> None:
    """Let go of all of them."""
    while fds:
        os.close(fds.pop())
