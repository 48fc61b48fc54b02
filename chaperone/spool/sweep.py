"""
One sweep of a spool at a time: `reap` and `gc` pass over all of it alone.

Knows: the file whose lock says that a sweep is at work.  Must not know: what a sweep does.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from ..errors import BusyError
from . import format


@contextlib.contextmanager
def sweep(spool_fd: int, spool_path: str) -> Iterator[None]:
    """
    Be the only sweep of a spool while a block runs.

    Of two, one could delete a run, a new run of that id could start, and the other would delete
    that one.

    Args:
        spool_fd (int): From `format.open_spool`.
        spool_path (str): The same spool's.
    Raises:
        BusyError: If another sweep is at work.
        SpoolError: If the lock's file can't be made, or is a planted link or someone else's.
    """
    import filelock  # here, because it takes 50 ms and most of those who import this never sweep

    # We look first: a filelock before 3.20 follows a planted symlink and empties what it leads to.
    # No other user can plant one after our look, because the spool is ours alone to write to.
    os.close(format.open_plain(spool_fd, format.SWEEP_LOCK, os.O_RDWR | os.O_CREAT))
    path = os.path.join(spool_path, format.SWEEP_LOCK)
    lock = filelock.FileLock(path, timeout=0, mode=0o600, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise BusyError(
            f"unable to sweep spool {spool_path!r}: another reap or gc is at work", errno.EAGAIN
        ) from error
    except OSError as error:
        raise format.failure(f"sweep spool {spool_path!r}", error) from error
    try:
        yield
    finally:
        lock.release()
