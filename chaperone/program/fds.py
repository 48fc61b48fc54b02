"""
File descriptors that are closed when a block ends, and pipes with more room.

Knows: close(2), fcntl(2).  Must not know: what is read or written.
"""

from __future__ import annotations

import fcntl
import os

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

    `with owned(os.open(...)) as fd:`. A class, for contextlib is too dear for the path that holds a run.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)


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
