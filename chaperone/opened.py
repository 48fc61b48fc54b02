"""
The fds of the streams that a follower read last.

Knows: how many fds a process may have.  Must not know: what is read from them.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Callable

from . import spool


class OpenStreams:
    """
    The fds of the streams that were read last: to open one for each event costs twice the CPU (measured, 5,000 lines/s).

    Args:
        most (int): How many are kept; None for half of what this process may open.
    """

    def __init__(self, most: int | None = None) -> None:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = most or (4_096 if soft == resource.RLIM_INFINITY else max(8, min(4_096, soft // 2)))
        self._fds: OrderedDict[tuple[str, str], int] = OrderedDict()

    def get(self, run_id: str, stream: str, opened: Callable[[], int]) -> int:
        """The fd of a stream, made by `opened` if there is none; it may be closed by the next call."""
        name = (run_id, stream)
        fd = self._fds.get(name)
        if fd is None:
            while len(self._fds) >= self._most:
                os.close(self._fds.popitem(last=False)[1])
            self._fds[name] = fd = opened()
        else:
            self._fds.move_to_end(name)
        return fd

    def drop(self, run_id: str) -> None:
        """Close what is open of a run."""
        for stream in spool.STREAMS:
            fd = self._fds.pop((run_id, stream), None)
            if fd is not None:
                os.close(fd)

    def close(self) -> None:
        """Close all of them."""
        while self._fds:
            os.close(self._fds.popitem()[1])
