"""
Standard input for a program that is not here: opened, its size fixed before it is sent.

Knows: files of the near side.  Must not know: how it gets there.
"""

from __future__ import annotations

import os
import stat

from .errors import StartError


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
        if isinstance(stdin, str):
            self._fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
            with open(self._fd, "wb", closefd=False) as file:
                file.write(stdin.encode("utf-8", "surrogateescape"))
            self.size = os.fstat(self._fd).st_size
            return
        path = stdin["file"]
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(self._fd)
        except OSError as error:
            raise StartError("spawn", f"unable to open stdin {path!r}: {error.strerror}", error.errno, type(error).__name__) from error
        if path != os.devnull and not stat.S_ISREG(found.st_mode):
            raise StartError("spawn", f"unable to send stdin {path!r}: want a regular file, whose size is known before it is sent")
        self.size = found.st_size

    def source(self) -> tuple[int, int] | None:
        """The fd and how many bytes of it to send; None for nothing."""
        return (self._fd, self.size) if self.size else None
