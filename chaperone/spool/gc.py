"""
Retention: which ended runs are deleted, and how, so that no reader, no other gc and no crash can do
harm.

Knows: ages, sizes, what may hinder a deletion.  Must not know: the command line.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from ..errors import NoRunError, SpoolError
from ..model import status as statuses
from ..program.fds import owned
from . import format, locks, look
from .sweep import sweep


@attrs.frozen(kw_only=True)
class Ended:
    """
    An ended run that may be deleted.

    Attributes:
        ended_s (float): When its status was published, in seconds since the epoch.
        bytes (int): Its size on disk; 0 if it was not asked for.
        failed (bool): Whether it did not end with code 0; False if that was not asked for.
        uncollected (bool): Whether it still has its entry: no scheduler has committed its ending.
    """

    run_id: str
    ended_s: float
    bytes: int
    failed: bool
    uncollected: bool


@attrs.frozen(kw_only=True)
class Summary:
    """
    What gc did, or would do without `dry_run`.

    Attributes:
        removed (list): The ids of the deleted runs, oldest first.
        freed (int): Bytes on disk.
        kept (int): How many ended runs are left.
        kept_bytes (int): Their size on disk, 0 if it was not asked for. It is more than `max_bytes`
            if `keep_failed_s` protects them.
        spared (int): How many of the kept runs were not deleted only because no scheduler has
            collected them.
        live (int): How many runs live, can be adopted, or wait for `reap`; gc never touches them.
        swept (int): How many deletions of a gc that died were finished.
        failed (list): Sentences about what could not be deleted.
    """

    removed: list[str]
    freed: int
    kept: int
    kept_bytes: int
    spared: int
    live: int
    swept: int
    failed: list[str]


def gc(
    spool_path: str,
    older_s: float | None = None,
    keep_failed_s: float | None = None,
    max_bytes: int | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    uncollected: bool = False,
) -> Summary:
    """
    Delete ended runs that were collected.

    Args:
        spool_path (str): Of an existing spool.
        older_s (float): Delete runs that ended more than so many seconds ago; None for none by age.
        keep_failed_s (float): Keep failed runs that ended less than so many seconds ago, whatever
            the other arguments say.
        max_bytes (int): Then delete the oldest, until the ended runs take no more than this on
            disk; live runs are not counted.
        dry_run (bool): Delete nothing. This works even while another gc or reap works.
        progress: Called with how many runs were looked at or deleted, and how many there are.
        uncollected (bool): Also delete runs that no scheduler has collected. Otherwise they are
            spared: their scheduler may only be late.
    Returns:
        Summary: What was deleted and what is left.
    Raises:
        BusyError: If another gc or reap works.
        SpoolError: If the spool can't be used.
    """
    report = progress or (lambda done, of: None)
    alone = contextlib.nullcontext() if dry_run else None
    with owned(format.open_spool(spool_path)) as spool_fd, alone or sweep(spool_fd, spool_path):
        swept, stuck = (0, []) if dry_run else _swept(spool_fd)
        ended, live, failed = _looked(
            spool_fd, keep_failed_s is not None, max_bytes is not None, report
        )
        now_s = time.time()
        wanted = _chosen(ended, ended, now_s, older_s, keep_failed_s, max_bytes)
        free = [run for run in ended if uncollected or not run.uncollected]
        chosen = _chosen(ended, free, now_s, older_s, keep_failed_s, max_bytes)
        spared = 0 if uncollected else sum(run.uncollected for run in wanted)
        failed = stuck + failed
        removed = []
        freed = 0
        for number, run in enumerate(chosen):
            try:
                freed += run.bytes if dry_run else _removed(spool_fd, run.run_id)
                removed.append(run.run_id)
            except OSError as error:
                failed.append(_sentence(f"delete run {run.run_id!r}", error))
            report(number + 1, len(chosen))
    gone = set(removed)
    kept = [run for run in ended if run.run_id not in gone]
    return Summary(
        removed=removed,
        freed=freed,
        kept=len(kept),
        kept_bytes=sum(run.bytes for run in kept),
        spared=spared,
        live=live,
        swept=swept,
        failed=failed,
    )


def _sentence(verb: str, error: OSError) -> str:
    return str(error if isinstance(error, SpoolError) else format.failure(verb, error))


# A chaperone that has published the end of its run is gone soon, but a caller of `wait` may be here
# before that.
LEAVING_S = 10
PROBE_S = 0.1  # a reader's probe holds a lock for microseconds

# What a user must do before a run in this state can be deleted.
FIRST = {"unattended": "adopt", "lost": "reap"} | dict.fromkeys(statuses.LIVE, "stop")


def delete(spool_path: str, run_id: str) -> int:
    """
    Delete one run that has ended, collected or not. Wait some seconds if its chaperone is still
    about to exit.

    Args:
        spool_path (str): Of an existing spool.
        run_id (str): Its whole id.
    Returns:
        int: How many bytes on disk became free.
    Raises:
        NoRunError: If it does not exist.
        BusyError: If a gc or reap works.
        SpoolError: If it is live, unattended or not reaped yet (errno EBUSY), or can't be deleted.
    """
    with owned(format.open_spool(spool_path)) as spool_fd, sweep(spool_fd, spool_path):
        with owned(format.open_run(spool_fd, run_id)) as run_fd:
            if look.ended_at(run_fd) is None or not look.left_within(run_fd, LEAVING_S):
                state = look.look(run_fd, run_id)[1]["state"]
                first = f"{FIRST.get(state, 'wait for')} it"
                feeder = look.feeder(look.read_spec(run_fd))
                if state == "unattended" and feeder is not None:
                    first = f"start {feeder} again"
                raise SpoolError(
                    f"unable to delete run {run_id!r}: it is {state}; {first} first", errno.EBUSY
                )
        try:
            return _removed(spool_fd, run_id)
        except SpoolError:
            raise
        except OSError as error:
            raise format.failure(f"delete run {run_id!r}", error) from error


# -- which


def _looked(
    spool_fd: int, ask_failed: bool, ask_bytes: bool, report: Callable[[int, int], None]
) -> tuple[list[Ended], int, list[str]]:
    """
    The ended runs, how many others there are, and sentences about those that can't be read.
    """
    ended, live, failed = [], 0, []
    ids = format.all_ids(spool_fd)
    for number, run_id in enumerate(ids):
        try:
            run = _ended(spool_fd, run_id, ask_failed, ask_bytes)
        except NoRunError:
            continue
        except OSError as error:
            failed.append(_sentence(f"read run {run_id!r}", error))
            continue
        if run is None:
            live += 1
        else:
            ended.append(run)
        report(number + 1, len(ids))
    return sorted(ended, key=lambda run: (run.ended_s, run.run_id)), live, failed


def _ended(spool_fd: int, run_id: str, ask_failed: bool, ask_bytes: bool) -> Ended | None:
    """
    None if it is not certain that the run has ended: it lives, can be adopted, or is lost and not
    reaped.
    """
    with owned(format.open_run(spool_fd, run_id)) as run_fd:
        ended_s = look.ended_at(run_fd)
        if ended_s is None or look.pulse(run_fd):
            return None
        final = look.read_final(run_fd, run_id) if ask_failed else None
        failed = ask_failed and (final is None or statuses.exit_code(final) != 0)
        size = sum(found.st_blocks * 512 for _, found in _files(run_fd)) if ask_bytes else 0
        return Ended(
            run_id=run_id,
            ended_s=ended_s,
            bytes=size,
            failed=failed,
            uncollected=format.where_entered(spool_fd, run_id) is not None,
        )


def _chosen(
    ended: list[Ended],
    free: list[Ended],
    now_s: float,
    older_s: float | None,
    keep_failed_s: float | None,
    max_bytes: int | None,
) -> list[Ended]:
    """Which of the `free` runs to delete, oldest first."""
    free = [
        run
        for run in free
        if not (run.failed and keep_failed_s is not None and now_s - run.ended_s <= keep_failed_s)
    ]
    chosen = [run for run in free if older_s is not None and now_s - run.ended_s > older_s]
    if max_bytes is not None:
        taken = sum(run.bytes for run in ended) - sum(run.bytes for run in chosen)
        for run in free[len(chosen) :]:  # by age: the chosen ones are the first of them
            if taken <= max_bytes:
                break
            chosen.append(run)
            taken -= run.bytes
    return chosen


# -- deleting


def _removed(spool_fd: int, run_id: str) -> int:
    """
    Delete one ended run.

    Its entry is deleted first, because after the rename a new run may have the name. The rename
    frees the id, and hides the run from readers that use its path. A reader with an fd can't take
    it for a lost run, because status.json is the last file that is deleted.

    Returns:
        int: How many bytes became free.
    """
    with (
        owned(format.open_run(spool_fd, run_id)) as run_fd,
        _held_lock(run_fd, run_id) as was_ending,
    ):
        if look.ended_at(run_fd) is None or not format.is_path_of(spool_fd, run_id, run_fd):
            why = "another run has its id now"
            raise SpoolError(f"unable to delete run {run_id!r}: {why}")
        format.remove_entry(spool_fd, format.ENDED, run_id)
        gone = f".{run_id}.{os.urandom(8).hex()}{format.GONE}"
        os.rename(run_id, gone, src_dir_fd=spool_fd, dst_dir_fd=spool_fd)
        if was_ending:
            _sweep_running(spool_fd, run_id)
    return _deleted(spool_fd, gone)


@contextlib.contextmanager
def _held_lock(run_fd: int, run_id: str) -> Iterator[bool]:
    """
    Hold the lock of a run whose ending is incomplete, so that no reap works on it; yields False if
    the run has no lock any more.
    """
    with contextlib.ExitStack() as stack:
        try:
            fd = stack.enter_context(owned(format.open_plain(run_fd, format.LOCK)))
        except FileNotFoundError:
            yield False
            return
        if not locks.take_within(fd, PROBE_S):
            raise SpoolError(
                f"unable to delete run {run_id!r}: another process holds its lock", errno.EAGAIN
            )
        yield True


def _sweep_running(spool_fd: int, run_id: str) -> None:
    """
    Remove the entry of a run whose ending was incomplete: it points to nothing now. While a starter
    works, it stays until the next `reap`.
    """
    with owned(format.open_entries(spool_fd, format.RUNNING)) as running_fd:
        format.sweep_entry(spool_fd, running_fd, run_id)


def _swept(spool_fd: int) -> tuple[int, list[str]]:
    """
    Finish the deletions of a gc that was killed. What can't be deleted is reported, and does not
    hinder the others.
    """
    swept, failed = 0, []
    for name in format.hidden_directories(spool_fd, format.GONE):
        try:
            _deleted(spool_fd, name)
            swept += 1
        except OSError as error:
            failed.append(_sentence(f"delete {name!r}", error))
    return swept, failed


def _deleted(parent_fd: int, name: str) -> int:
    """
    Delete a directory and everything in it; no symlink is followed. Returns how many bytes became
    free.
    """
    with owned(os.open(name, format.DIRECTORY, dir_fd=parent_fd)) as fd:
        # Directories first. Directories inside them are moved up and wait for their turn, so that
        # neither the stack nor the number of open files limits the depth.
        waiting = _directories(fd)
        freed = 0
        while waiting:
            freed += _flattened(fd, waiting.pop(), waiting)
        files = dict(_files(fd))
        # For readers with an fd: a run without its lock, with its status, has ended; without its
        # spec it is being deleted.
        for file in sorted(
            files, key=lambda file: (file == format.FINAL_STATUS, file == format.SPEC)
        ):
            freed += _unlinked(fd, file, files[file])
    os.rmdir(name, dir_fd=parent_fd)
    return freed


def _directories(fd: int) -> list[str]:
    return [name for name, found in _files(fd) if stat.S_ISDIR(found.st_mode)]


def _flattened(top_fd: int, name: str, waiting: list[str]) -> int:
    """
    Delete a directory inside the one that is being deleted. Its own directories are moved up, and
    their new names are added to `waiting`. Returns how many bytes became free.
    """
    freed = 0
    with owned(os.open(name, format.DIRECTORY, dir_fd=top_fd)) as fd:
        for inner, found in _files(fd):
            if stat.S_ISDIR(found.st_mode):
                moved = os.urandom(16).hex()
                os.rename(inner, moved, src_dir_fd=fd, dst_dir_fd=top_fd)
                waiting.append(moved)
            else:
                freed += _unlinked(fd, inner, found)
    os.rmdir(name, dir_fd=top_fd)
    return freed


def _unlinked(fd: int, name: str, found: os.stat_result) -> int:
    os.unlink(name, dir_fd=fd)
    return found.st_blocks * 512 if found.st_nlink == 1 else 0


def _files(fd: int) -> Iterator[tuple[str, Any]]:
    """The contents of a directory, as (name, stat result)."""
    for name in os.listdir(fd):
        try:
            yield name, os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
