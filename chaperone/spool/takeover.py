"""
Takes over a run whose chaperone died, to record its end or to hold it further (rule R6).

Knows: locks, and how long to wait for them.  Must not know: processes, signals, ssh, what is done
with the run.
"""

from __future__ import annotations

import os
import time

from . import format, locks, look
from .run_directory import RunDirectory

# A guard takes at most so long: 10 s for processes that die slowly, then what its pipes still hold.
GUARD_S = 15.0


def take_over(
    spool_fd: int, path: str, run_id: str, patience_s: float = 1.0
) -> RunDirectory | None:
    """
    Take the lock of a run whose chaperone died (rule R6).

    Args:
        spool_fd (int): From `format.open_spool`; the caller closes it.
        path (str): The path of the spool.
        patience_s (float): How long to wait for the probes of readers, which hold the lock for
            microseconds.
    Returns:
        RunDirectory: Locked; it may have a final status already, see `is_ended`. None if another
            process holds the lock, or there is no lock.
    Raises:
        NoRunError: If there is no such run.
        SpoolError: If its files can't be opened.
    """
    run_fd = format.open_run(spool_fd, run_id)
    lock_fd = -1
    try:
        # For writing, so that followers get an event when it is closed.
        lock_fd = format.open_plain(run_fd, format.LOCK, os.O_RDWR)
        if (
            locks.try_share(lock_fd)  # first: while we try to take it, a probe would say "alive"
            and locks.take_within(lock_fd, patience_s)
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


def _is_still(spool_fd: int, run_id: str, run_fd: int, lock_fd: int) -> bool:
    """Whether the file that we locked is still the lock of the run with this name."""
    lock = format.found(run_fd, format.LOCK)
    return (
        lock is not None
        and os.path.samestat(lock, os.fstat(lock_fd))
        and format.is_path_of(spool_fd, run_id, run_fd)
    )


def wait_for_guard(run: RunDirectory, patience_s: float = GUARD_S) -> bool:
    """
    Wait until the guard of a dead chaperone has killed the program's processes and drained its
    pipes into the streams.

    Args:
        run (RunDirectory): From `take_over`.
    Returns:
        bool: Whether the streams are final; while a guard works, it shares a lock on them.
    """
    deadline = time.monotonic() + patience_s
    free = [locks.take_within(fd, deadline - time.monotonic()) for fd in run.streams.values()]
    for fd in run.streams.values():
        locks.share(fd)  # as at the start of a run: the guard of the next chaperone shares it
    return all(free)
