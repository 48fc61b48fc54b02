"""
One sweep of a spool at a time: `reap` and `gc` pass over all of it alone.

Knows: the file whose lock says that a sweep is at work, and whose times what it left.
Must not know: what a sweep does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator

from ..errors import BusyError
from . import format, look

# A directory that changed so shortly before our look may change again without a new time: the
# clock of a filesystem ticks every 4 to 10 ms, and some keep whole seconds alone.
TICK_NS = 2_000_000_000


class Memory:
    """
    What the last whole sweep of a spool has left to look at. The times of the sweep's lock keep it:
    the atime says in which boot that sweep was, the mtime when the spool or `.ended` had changed.

    Args:
        spool_fd (int): The lock is there, and not taken yet: some versions of filelock empty the
            file then, which changes its mtime.

    Attributes:
        is_of_this_boot (bool): Whether there was one since this host was booted, so that no power
            cut can have taken an entry since.
        nothing_changed (bool): Whether since then no run appeared, ended or was deleted, so that
            there is nothing to look at but the live runs.
    """

    def __init__(self, spool_fd: int) -> None:
        self._spool_fd = spool_fd
        kept = os.stat(format.SWEEP_LOCK, dir_fd=spool_fd, follow_symlinks=False)
        boot = (look.boot_id() or "").replace("-", "")[:7]
        # 28 bits: seconds that each filesystem can keep.
        self._boot_ns = int(boot, 16) * 10**9 if boot else None
        changes = [format.found(spool_fd, name) for name in (".", format.ENDED)]
        self._changed_ns = max(change.st_mtime_ns for change in changes if change)
        self.is_of_this_boot = kept.st_atime_ns == self._boot_ns
        self.nothing_changed = self.is_of_this_boot and kept.st_mtime_ns == self._changed_ns

    def keep(self) -> None:
        """This sweep was whole, and left nothing for the next one but the live runs."""
        if self._boot_ns is None:
            return
        is_settled = time.time_ns() - self._changed_ns > TICK_NS
        os.utime(
            format.SWEEP_LOCK,
            ns=(self._boot_ns, self._changed_ns if is_settled else 0),
            dir_fd=self._spool_fd,
            follow_symlinks=False,
        )


@contextlib.contextmanager
def sweep(spool_fd: int, spool_path: str) -> Iterator[Memory]:
    """
    Be the only sweep of a spool while a block runs.

    Of two, one could delete a run, a new run of that id could start, and the other would delete
    that one.

    Args:
        spool_fd (int): From `format.open_spool`.
        spool_path (str): The same spool's.
    Yields:
        Memory: What the last one has left to look at.
    Raises:
        BusyError: If another sweep is at work.
        SpoolError: If the lock's file can't be made, or is a planted link or someone else's.
    """
    import filelock  # here, because it takes 50 ms and most of those who import this never sweep

    # We look first: a filelock before 3.20 follows a planted symlink and empties what it leads to.
    # No other user can plant one after our look, because the spool is ours alone to write to.
    os.close(format.open_plain(spool_fd, format.SWEEP_LOCK, os.O_RDWR | os.O_CREAT))
    memory = Memory(spool_fd)
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
        yield memory
    finally:
        lock.release()
