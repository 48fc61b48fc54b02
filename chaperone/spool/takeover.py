"""
Taking a run over whose chaperone has died, to record its end or to go on with it (rule R6).

Knows: locks, and how long to wait for them.  Must not know: processes, signals, ssh, what becomes
of the run.
"""

from __future__ import annotations

import fcntl
import os
import time

from . import format, look
from .run_directory import RunDirectory

# Of the guard: 200 looks of 50 ms and more for what left the group, then 2 s for a pipe that stays
# open.
GUARD_S = 15.0


def take_over(
    spool_fd: int, path: str, run_id: str, patience_s: float = 1.0
) -> RunDirectory | None:
    """
    Take the lock of a run whose chaperone has died (rule R6).

    Args:
        spool_fd (int): From `spool.open_spool`; stays the caller's.
        path (str): The spool's.
        patience_s (float): How long readers' probes, which hold the lock for microseconds, may
            stand in the way.
    Returns:
        RunDirectory: Locked; it may have a final status already, see `is_ended`. None if somebody
            holds the lock, or there is none.
    Raises:
        NoRunError: If there is no such run.
        SpoolError: If its files can't be opened.
    """
    run_fd, lock_fd = format.open_run(spool_fd, run_id), -1
    try:
        lock_fd = format.open_plain(
            run_fd, format.LOCK, os.O_RDWR
        )  # to write, so that its close is an event for followers
        if (
            _probed(lock_fd)
            and _locked(lock_fd, patience_s)
            and _is_still(spool_fd, run_id, run_fd, lock_fd)
        ):
            spec = look.read_spec(run_fd)
            run = RunDirectory(
                spool_fd,
                f"{os.path.abspath(path)}/{run_id}",
                run_id,
                str(spec.get("key", "")),
                run_fd,
                lock_fd,
            )
            run_fd = lock_fd = -1
            try:
                run.open_files(os.O_CREAT)
            except BaseException:
                run.close()
                raise
            return run
    except FileNotFoundError:  # it has ended, lock and all
        pass
    finally:
        for fd in (run_fd, lock_fd):
            if fd >= 0:
                os.close(fd)
    return None


def _probed(lock_fd: int) -> bool:
    """
    Shared first: an exclusive try would make a reader's probe say that the dead chaperone lives.
    """
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _locked(fd: int, patience_s: float) -> bool:
    deadline, pause_s = time.monotonic() + patience_s, 0.001
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)


def _is_still(spool_fd: int, run_id: str, run_fd: int, lock_fd: int) -> bool:
    """Whether what we have locked is still the lock of the run of that name."""
    lock = format.found(run_fd, format.LOCK)
    return (
        lock is not None
        and os.path.samestat(lock, os.fstat(lock_fd))
        and format.is_path_of(spool_fd, run_id, run_fd)
    )


def wait_for_guard(run: RunDirectory, patience_s: float = GUARD_S) -> bool:
    """
    Wait until a dead chaperone's guard has killed the program's group and drained its pipes into
    the streams.

    Args:
        run (RunDirectory): From `take_over`.
    Returns:
        bool: Whether the streams are final; a guard that still works holds a lock on them.
    """
    deadline = time.monotonic() + patience_s
    free = [_locked(fd, deadline - time.monotonic()) for fd in run.streams.values()]
    for fd in run.streams.values():
        fcntl.flock(
            fd, fcntl.LOCK_SH
        )  # as from the start: the guard of whoever goes on with the run shares it
    return all(free)
