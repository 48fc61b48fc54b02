"""
File descriptors that are closed when a block ends, pipes with more room, and fds sent to another
process.

Knows: close(2), fcntl(2), SCM_RIGHTS.  Must not know: what is read or written.
"""

from __future__ import annotations

import fcntl
import sys

from ..cpython import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..cpython import socket

# Numbers, because not every caller has imported a socket module.
SOL_SOCKET, SCM_RIGHTS, MSG_CMSG_CLOEXEC = 1, 1, 0x40000000
NULL = "/dev/null"
SENT_FDS = 8  # most in one message
# fcntl(2). Python 3.10 and later have the name, but only if it was built with a new libc.
F_SETPIPE_SZ = 1031
PIPE_BYTES = 65_536  # a new pipe's capacity, pipe(7)
# Room for a program that writes in bursts while the disk is busy. Larger ones capture no faster.
WIDE_PIPE_BYTES = 524_288


class owned:
    """
    An fd that is closed when the block ends, however it ends.

    Args:
        fd (int): As from open(2).

    `with owned(os.open(...)) as fd:`. It is a class because a chaperone can't afford contextlib.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)


def exists(path: str | bytes) -> bool:
    """Whether something has that name, itself if it is a symlink."""
    try:
        os.lstat(path)
    except OSError:
        return False
    return True


def contents(path: str) -> bytes:
    """
    All bytes of a file, of /proc or /sys, say. Not by open(): what that touches is 55 KiB of each
    warm run.
    """
    with owned(os.open(path, os.O_RDONLY)) as fd:
        return read_all(fd)


def read_all(fd: int, most: int | None = None) -> bytes:
    """The bytes of a file from here on; a little more than `most` of them if it has more."""
    parts = []
    size = 0
    while (part := os.read(fd, 4_096)) and (most is None or size <= most):
        parts.append(part)
        size += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def above_stderr(fd: int) -> int:
    """
    Move an fd above 0, 1 and 2, so that those of a child can be set in any order.

    Returns:
        int: The same fd, or a copy; then the fd itself is closed.
    """
    if fd > 2:
        return fd
    with owned(fd):
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def widened(fd: int) -> int:
    """
    Give more room to a pipe that fills up. A new pipe does not get it: 32 idle runs would use up
    pipe-user-pages-soft, and every later pipe of that user would have only two pages.

    Returns:
        int: Its capacity in bytes. If the kernel refuses, one byte more than a new pipe has, so
            that the caller does not ask again.
    """
    try:
        return fcntl.fcntl(fd, F_SETPIPE_SZ, WIDE_PIPE_BYTES)
    except OSError:
        return PIPE_BYTES + 1


def send_fds(connection: socket.socket, message: bytes, fds: list[int]) -> None:
    """
    Send a message and copies of some fds; the caller still closes its own.

    Source: unix(7), SCM_RIGHTS; until they are received they count against RLIMIT_NOFILE.
    """
    packed = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
    connection.sendmsg([message], [(SOL_SOCKET, SCM_RIGHTS, packed)] if fds else [])


def receive_fds(connection: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """The next message, of at most `size` bytes, and the fds that came with it; b"" at the end."""
    message, ancillary, _, _ = connection.recvmsg(size, 64 + 4 * SENT_FDS, MSG_CMSG_CLOEXEC)
    return message, list(memoryview(ancillary[0][2]).cast("i")) if ancillary else []
