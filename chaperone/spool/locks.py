"""
The kernel's locks on the files of a spool: runs, streams, entries, slots, the launcher.

Knows: flock(2), fcntl(2), how long to wait.  Must not know: which file a lock is on, or what it
guards.
"""

from __future__ import annotations

import fcntl
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FIRST_PAUSE_S = 0.001  # a reader's probe holds a lock for microseconds
LAST_PAUSE_S = 0.05  # a guard drains its pipes for seconds: 20 tries a second cost nothing


def take(fd: int) -> None:
    """Lock a file exclusively; waits as long as it takes. Closing the last fd unlocks it."""
    fcntl.flock(fd, fcntl.LOCK_EX)


def share(fd: int) -> None:
    """Lock a file shared; waits as long as it takes."""
    fcntl.flock(fd, fcntl.LOCK_SH)


def try_take(fd: int) -> bool:
    """Lock a file exclusively, without waiting; False if it is locked, exclusively or shared."""
    return _tried(fd, fcntl.LOCK_EX)


def try_share(fd: int) -> bool:
    """
    Lock a file shared, without waiting; False if it is locked exclusively.

    This is the probe of rule R4: two probes never disturb each other.
    """
    return _tried(fd, fcntl.LOCK_SH)


def take_within(fd: int, patience_s: float) -> bool:
    """
    Lock a file exclusively, and wait some seconds until it is unlocked.

    Returns:
        bool: False if the file was not unlocked within `patience_s`; at least one try is made.
    """
    return _within(try_take, fd, patience_s)


def share_within(fd: int, patience_s: float) -> bool:
    """Lock a file shared; otherwise as `take_within`."""
    return _within(try_share, fd, patience_s)


def _within(attempt: Callable[[int], bool], fd: int, patience_s: float) -> bool:
    """
    It polls, because flock(2) waits without a limit, and an alarm would need a signal of this
    process.
    """
    deadline = time.monotonic() + patience_s
    pause_s = FIRST_PAUSE_S
    while not attempt(fd):
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LAST_PAUSE_S)
    return True


def try_take_for_process(fd: int, byte: int | None = None) -> bool:
    """
    Lock a file, or one byte of it, for this process, without waiting; False if another process has
    locked it.

    This is a lock of fcntl(2), not of flock(2): a forked child does not inherit it, and it ends as
    soon as this process closes any fd of the file.
    """
    try:
        length, start = (0, 0) if byte is None else (1, byte)
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except BlockingIOError:
        return False
    return True


def is_free_for_process(fd: int, byte: int) -> bool:
    """Whether this process could lock a byte of a file; it does so for a moment."""
    if not try_take_for_process(fd, byte):
        return False
    fcntl.lockf(fd, fcntl.LOCK_UN, 1, byte)
    return True


def _tried(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
