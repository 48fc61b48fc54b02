"""
A program's standard input: opened, waited for, and for a program that is not here measured before it is sent.

Knows: files of the near side.  Must not know: who reads it, or how it gets there.
"""

from __future__ import annotations

import os
import select
import stat

from .errors import StartError


def opened(stdin: str | dict[str, str] | None) -> int:
    """
    Open a standard input, without waiting for anybody.

    Args:
        stdin (str | dict): As in a canonical spec: a text, a file, or /dev/null.
    Returns:
        int: An fd at its first byte, not blocking; the caller closes it.
    Raises:
        StartError: If it can't be opened, or the text can't be kept in memory.
    """
    doing = "keep stdin in memory"
    try:
        if isinstance(stdin, str):
            return _in_memory(stdin.encode("utf-8", "surrogateescape"))
        path = os.devnull if stdin is None else stdin["file"]
        doing = f"open stdin {path!r}"
        return os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StartError("spawn", f"unable to {doing}: {error.strerror}", error.errno, type(error).__name__) from error


def _in_memory(text: bytes) -> int:
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
    view = memoryview(text)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def is_awaited(fd: int) -> bool:
    """
    Whether this is a FIFO with a name into which nobody has written yet, and which nobody has let go of.

    open(2) would wait there for a writer, and a chaperone that waits in it hears no stop. A pipe that we inherited is
    none: its writer is there, or has been.
    """
    if not stat.S_ISFIFO(os.fstat(fd).st_mode) or os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
        return False
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return not poll.poll(0)


class Stdin:
    """What is to be sent; nothing until `open`."""

    def __init__(self) -> None:
        self._fd = -1
        self.size = 0

    def open(self, stdin: str | dict[str, str] | None) -> None:
        """
        Open it.

        Args:
            stdin (str | dict): As in a canonical spec.
        Raises:
            StartError: If it can't be opened, or has no size.
        """
        if stdin is None:
            return
        self._fd = opened(stdin)
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) and stdin != {"file": os.devnull}:
            path = stdin["file"] if isinstance(stdin, dict) else None
            raise StartError("spawn", f"unable to send stdin {path!r}: want a regular file, whose size is known before it is sent")
        self.size = found.st_size

    def source(self) -> tuple[int, int] | None:
        """The fd and how many bytes of it to send; None for nothing."""
        return (self._fd, self.size) if self.size else None
