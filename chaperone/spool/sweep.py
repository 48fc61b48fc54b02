"""
One sweep of a spool at a time: `reap` and `gc` go through all runs, and never together.

Knows: the file whose lock means that a sweep works, and whose times say what the last one left.
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

# A directory that has just changed may change again without a new mtime: the clock of a filesystem
# ticks every 4 to 10 ms, and some store only whole seconds.
TICK_NS = 2_000_000_000


class Memory:
    """
    What the last complete sweep has left for the next one. The times of the lock file store it: the
    atime says in which boot that sweep was, the mtime when the spool or `.ended` last changed.

    Args:
        spool_fd (int): Of a spool whose lock file exists and is not locked yet: some versions of
            filelock empty the file when they lock it, which changes its mtime.

    Attributes:
        is_of_this_boot (bool): Whether there was a sweep since the last boot of this host, so that
            no power failure can have lost an entry since.
        nothing_changed (bool): Whether no run has appeared, ended or been deleted since, so that
            only the live runs need a look.
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
        """Record that this sweep was complete: only the live runs are left for the next one."""
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

    If there were two, one could delete a run, a new run with that id could start, and the other
    would delete the new run.

    Args:
        spool_fd (int): From `format.open_spool`.
        spool_path (str): The path of the same spool.
    Yields:
        Memory: What the last sweep has left to look at.
    Raises:
        BusyError: If another sweep works.
        SpoolError: If the lock file can't be made, is a planted link, or belongs to another user.
    """
    import filelock  # here, because it takes 50 ms and most processes with this module never sweep

    # Look first: filelock before 3.20 follows a planted symlink and empties the file behind it. No
    # other user can plant one after this look, because only we can write to the spool.
    os.close(format.open_plain(spool_fd, format.SWEEP_LOCK, os.O_RDWR | os.O_CREAT))
    memory = Memory(spool_fd)
    path = os.path.join(spool_path, format.SWEEP_LOCK)
    lock = filelock.FileLock(path, timeout=0, mode=0o600, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise BusyError(
            f"unable to reap or gc spool {spool_path!r}: another chaperone reap or gc is running",
            errno.EAGAIN,
        ) from error
    except OSError as error:
        raise format.failure(f"sweep spool {spool_path!r}", error) from error
    try:
        yield memory
    finally:
        lock.release()
