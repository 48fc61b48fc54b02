"""
File descriptors that are closed when a block ends, pipes with more room, and fds sent to another
process.

Knows: close(2), fcntl(2), SCM_RIGHTS.  Must not know: what is read or written.
"""

from __future__ import annotations

import fcntl
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..cpython import socket

SOL_SOCKET, SCM_RIGHTS = (
    1,
    1,
)  # not asked of a socket module here, which not every user has imported
SENT_FDS = 8  # most in one message
F_SETPIPE_SZ = (
    1031  # fcntl(2); Python names it from 3.10 on, but only where it was built with a new libc
)
PIPE_BYTES = 65_536  # a new pipe's capacity, pipe(7)
WIDE_PIPE_BYTES = 1_048_576  # so that a writer of bursts goes on while the disk is busy


class owned:
    """
    An fd that is closed when the block ends, however it ends.

    Args:
        fd (int): As from open(2).

    `with owned(os.open(...)) as fd:`. A class, because contextlib costs the holding path too much.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)


def above_stderr(fd: int) -> int:
    """
    Move an fd away from 0, 1 and 2, so that a child's three can be set in any order.

    Returns:
        int: The fd, or in place of it, which is then closed, a copy.
    """
    if fd > 2:
        return fd
    with owned(fd):
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def widened(fd: int) -> int:
    """
    Give a pipe that fills up more room. Not before: 32 idle runs would use up what
    pipe-user-pages-soft grants a user, and every later pipe of theirs would be two pages.

    Returns:
        int: Its capacity in bytes; where the kernel refuses, one byte more than a new pipe has, so
            that it is not asked again.
    """
    try:
        return fcntl.fcntl(fd, F_SETPIPE_SZ, WIDE_PIPE_BYTES)
    except OSError:
        return PIPE_BYTES + 1


def send_fds(connection: socket.socket, message: bytes, fds: list[int]) -> None:
    """
    Send a message with some fds; they stay the caller's.

    Source: unix(7), SCM_RIGHTS; until they are received they count against RLIMIT_NOFILE.
    """
    packed = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
    connection.sendmsg([message], [(SOL_SOCKET, SCM_RIGHTS, packed)] if fds else [])


def receive_fds(connection: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """The next message, of at most `size` bytes, and the fds that came with it; b"" at the end."""
    message, ancillary, _, _ = connection.recvmsg(size, 64 + 4 * SENT_FDS)
    packed = b"".join(data for _, _, data in ancillary)
    places = range(0, len(packed) - 3, 4)
    fds = [int.from_bytes(packed[place : place + 4], sys.byteorder) for place in places]
    for fd in fds:
        os.set_inheritable(fd, False)
    return message, fds
