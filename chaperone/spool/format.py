"""
The on-disk format of a spool, version 1: the only module that knows a file name.

    SPOOL/                 one scheduler's runs; 0700, on a local filesystem
      .running/RUNID       a symlink to ../RUNID for each live run
      .ended/RUNID         the same entry, moved here when the run has ended, until it is collected
      .RUNID.RANDOM.new/   being built      .RUNID.RANDOM.gone/   being deleted
      RUNID/               0700, files 0600; complete from the moment it is visible
        spec.json          what was asked, with the run's key; written once
        lock               flock held by the chaperone as long as it lives: its pulse
        control            FIFO: requests to the chaperone, one a line
        running.json       the status so far; replaced whole
        .status            room reserved for the final status
        stdout stderr log  append-only bytes
        timeline           when they came, where the spec asks for it; append-only lines
        status.json        the final status: there if and only if the run has ended

The rules W1-W5 and R1-R6 that this module keeps are told in docs/spool-format.rst.
Knows: files, locks, JSON.  Must not know: processes, signals, ssh, the clock.
"""

from __future__ import annotations

import errno
import os
import stat

from ..errors import NoRunError, SpoolError
from ..model import jsontext
from ..model.spec import is_run_id
from ..program.fds import owned
from . import locks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

VERSION = 1
STREAMS = ("stdout", "stderr")
RESERVE = 16 * 1024  # bytes for the final status beyond what it repeats of the spec (rule W5)
# In the spool
RUNNING = ".running"
ENDED = ".ended"
CONNECT = ".connect"
LAUNCHER = ".launcher"
LAUNCHER_LOCK = ".launcher.lock"
SWEEP_LOCK = ".sweep.lock"
NEW = ".new"
GONE = ".gone"
# In a run directory
SPEC = "spec.json"
LOCK = "lock"
CONTROL = "control"
LOG = "log"
TIMELINE = "timeline"
LIVE_STATUS = "running.json"
BUILDING = ".running.json"
RESERVED = ".status"
FINAL_STATUS = "status.json"
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def failure(verb: str, error: OSError) -> SpoolError:
    """The one sentence for what the system refused: `unable to VERB: reason`."""
    return SpoolError(f"unable to {verb}: {error.strerror}", error.errno)


def found(directory_fd: int, name: str) -> os.stat_result | None:
    """What is there under a name, itself if it is a symlink; None if nothing is."""
    try:
        return os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None


# -- the spool


def open_spool(path: str, create: bool = False) -> int:
    """
    Open a spool.

    Args:
        path (str): Absolute or relative; a symlink to the spool is followed, none inside it is.
        create (bool): Make it, 0700, if it is not there; its parent must be.
    Returns:
        int: A directory's fd; the caller closes it.
    Raises:
        SpoolError: If it is not there, is no directory, belongs to someone else, or others may
            write to it.
    """
    try:
        if create:
            make_directory(path, None)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise failure(f"open spool {path!r}", error) from error
    try:
        ours = os.fstat(fd)
        if ours.st_uid != os.geteuid():
            raise SpoolError(
                f"unable to use spool {path!r}: want it owned by uid {os.geteuid()},"
                f" got uid {ours.st_uid}",
                errno.EPERM,
            )
        if ours.st_mode & 0o022:
            raise SpoolError(
                f"unable to use spool {path!r}: want it writable by nobody else,"
                f" got mode {ours.st_mode & 0o7777:04o}",
                errno.EPERM,
            )
        for name in (RUNNING, ENDED) if create else ():
            make_directory(name, fd)
    except OSError as error:
        os.close(fd)
        raise (
            error if isinstance(error, SpoolError) else failure(f"use spool {path!r}", error)
        ) from error
    return fd


def make_directory(path: str, dir_fd: int | None) -> None:
    """Make a directory that is ours alone; nothing to do when something of that name is there."""
    try:
        os.mkdir(path, 0o700, dir_fd=dir_fd)
    except FileExistsError:
        pass


def open_entries(spool_fd: int, name: str) -> int:
    """
    Open `.running`, `.ended` or `.connect`, and nothing that a planted symlink leads to.

    Returns:
        int: A directory's fd; the caller closes it.
    Raises:
        FileNotFoundError: If it is not there.
        SpoolError: If it is no directory of ours.
    """
    try:
        fd = os.open(name, DIRECTORY, dir_fd=spool_fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise failure(f"open {name!r} of the spool", error) from error
    return _owned_by_us(fd, f"{name!r} of the spool")


def _owned_by_us(fd: int, what: str) -> int:
    """The same fd; where it is of another user's directory it is closed, and that is an error."""
    uid = os.geteuid()
    if os.fstat(fd).st_uid != uid:
        os.close(fd)
        raise SpoolError(f"unable to use {what}: want it owned by uid {uid}", errno.EPERM)
    return fd


# Each of the three takes how the ids must begin. That is checked first: in a spool of 100,000 runs
# the check of the whole id takes three times as long as the listing.


def _ids(directory_fd: int, prefixes: tuple[str, ...]) -> list[str]:
    return sorted(
        name for name in os.listdir(directory_fd) if name.startswith(prefixes) and is_run_id(name)
    )


def _entries(spool_fd: int, name: str, prefixes: tuple[str, ...]) -> list[str]:
    try:
        fd = open_entries(spool_fd, name)
    except FileNotFoundError:
        return []
    with owned(fd):
        return _ids(fd, prefixes)


def live_ids(spool_fd: int, prefixes: tuple[str, ...] = ("",)) -> list[str]:
    """The ids in .running/: live runs, runs about to appear, and runs whose chaperone died."""
    return _entries(spool_fd, RUNNING, prefixes)


def ended_ids(spool_fd: int, prefixes: tuple[str, ...] = ("",)) -> list[str]:
    """The ids in .ended/: runs that have ended and were not collected."""
    return _entries(spool_fd, ENDED, prefixes)


def all_ids(spool_fd: int, prefixes: tuple[str, ...] = ("",)) -> list[str]:
    """The ids of all run directories, the collected ones too: costs as much as there is history."""
    return _ids(spool_fd, prefixes)


def has_lock(spool_fd: int, run_id: str) -> bool:
    """Whether a run's lock is there, held or not: it goes with the last step of an ending."""
    return found(spool_fd, f"{run_id}/{LOCK}") is not None


def hidden_directories(spool_fd: int, kind: str) -> list[str]:
    """
    The names of run directories that are being built (NEW) or deleted (GONE), or whose maker died
    at it.
    """
    # .RUNID.RANDOM: `.launcher.new` is a socket that is being made.
    return sorted(
        name
        for name in os.listdir(spool_fd)
        if name.startswith(".") and name.endswith(kind) and name.count(".") > 2
    )


def entered(spool_fd: int, names: Iterable[str] | None) -> Iterator[tuple[str, str]]:
    """
    The runs that have an entry, each with RUNNING or ENDED; in the order in which the entries move,
    so that one that is moving may come twice.

    Args:
        names: The ids to look for, whatever the others are; None for all.
    """
    if names is None:
        yield from ((run_id, RUNNING) for run_id in live_ids(spool_fd))
        yield from ((run_id, ENDED) for run_id in ended_ids(spool_fd))
    for run_id in sorted(filter(is_run_id, names or ())):
        where = where_entered(spool_fd, run_id)
        if where is not None:
            yield run_id, where


def where_entered(spool_fd: int, run_id: str) -> str | None:
    """
    Where the id stands: RUNNING, ENDED, or None if it is in neither, because it was collected;
    costs the same however many there are.
    """
    # An ending moves the entry, and then removes the lock. An entry in RUNNING of a run that has
    # ended to its last step was left there by a second starter of the id, which died.
    # The lock first: in the other order an ending between our looks would seem to be collected.
    is_over = not has_lock(spool_fd, run_id) and found(spool_fd, f"{run_id}/{FINAL_STATUS}")
    # In the order in which the entries move: one that is moving is seen in either.
    places = (ENDED,) if is_over else (RUNNING, ENDED)
    return next((where for where in places if found(spool_fd, f"{where}/{run_id}")), None)


def remove_entry(spool_fd: int, name: str, run_id: str) -> bool:
    """Take an entry out of RUNNING or ENDED; False if it is not there."""
    try:
        with owned(open_entries(spool_fd, name)) as fd:
            os.unlink(run_id, dir_fd=fd)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise (
            error
            if isinstance(error, SpoolError)
            else failure(f"remove the entry of run {run_id!r} in {name!r}", error)
        ) from error
    return True


def sweep_entry(spool_fd: int, running_fd: int, run_id: str) -> bool:
    """
    Take an entry that no run needs out of .running/.

    Only while no starter is at work (rule W1): an entry may be there a moment before its run, and
    two starters of one id share one. While a starter works the entry stays for the next `reap`.

    Args:
        running_fd (int): Of .running/; the lock on it is taken exclusively, or lost.
    Returns:
        bool: Whether it was removed: its run is not there, or has ended completely.
    """
    try:
        if not locks.try_take(running_fd):
            return False
        if not found(spool_fd, run_id) or (
            not found(spool_fd, f"{run_id}/{LOCK}") and found(spool_fd, f"{run_id}/{FINAL_STATUS}")
        ):
            os.unlink(run_id, dir_fd=running_fd)
            return True
    except OSError:
        pass
    return False


# -- files in a run directory


def open_plain(directory_fd: int, name: str, flags: int = os.O_RDONLY) -> int:
    """
    Open one of our own files in a run directory.

    Args:
        flags (int): As for open(2).
    Returns:
        int: Its fd; the caller closes it.
    Raises:
        FileNotFoundError: If it is not there.
        SpoolError: If it can't be opened (the control FIFO: ENXIO when nobody reads it), or is a
            planted link or someone else's.
    """
    try:
        fd = os.open(name, flags | FILE, 0o600, dir_fd=directory_fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise failure(f"open {name!r}", error) from error
    ours, kind = os.fstat(fd), stat.S_IFIFO if name == CONTROL else stat.S_IFREG
    is_ours = stat.S_IFMT(ours.st_mode) == kind and ours.st_uid == os.geteuid()
    # A second link is a backup's (`cp -al`, rsnapshot), or was planted: by who may write here.
    if not is_ours or (ours.st_nlink > 1 and os.fstat(directory_fd).st_mode & 0o022):
        os.close(fd)
        want = "FIFO" if kind == stat.S_IFIFO else "file"
        raise SpoolError(
            f"unable to open {name!r}: want a {want} of this user without other links", errno.EPERM
        )
    return fd


def create_plain(directory_fd: int, name: str, flags: int = os.O_WRONLY) -> int:
    """Make a file that was not there; its fd, which the caller closes."""
    return os.open(name, flags | os.O_CREAT | os.O_EXCL | FILE, 0o600, dir_fd=directory_fd)


def unlink(name: str, dir_fd: int) -> None:
    """Remove a file, if that can be done."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except OSError:  # reap sweeps a file that is left behind; it never hides the status
        pass


def remove_tree(spool_fd: int, name: str) -> None:
    """Delete a directory of plain files; one that is not there is no error."""
    try:
        fd = os.open(name, DIRECTORY, dir_fd=spool_fd)
    except OSError:
        return
    with owned(fd):
        for entry in os.listdir(fd):
            unlink(entry, fd)
    try:
        os.rmdir(name, dir_fd=spool_fd)
    except OSError:
        pass


def read_json(directory_fd: int, name: str) -> object:
    """The value, or None where the file is missing, torn or no JSON."""
    try:
        with owned(open_plain(directory_fd, name)) as fd:
            if os.fstat(fd).st_size > jsontext.LIMIT:
                return None
            with open(fd, "rb", closefd=False) as file:
                return jsontext.loads(file.read())
    except (FileNotFoundError, ValueError):
        return None


# -- how a reader looks


def open_run(spool_fd: int, run_id: str) -> int:
    """
    Open a run directory to look into it.

    Returns:
        int: A directory's fd; the caller closes it.
    Raises:
        NoRunError: If it is not there.
        SpoolError: If it is no directory of ours.
    """
    if not is_run_id(run_id):
        raise NoRunError(f"unable to find run {run_id!r}: that is not a valid run id", errno.ENOENT)
    try:
        fd = os.open(run_id, DIRECTORY, dir_fd=spool_fd)
    except FileNotFoundError as error:
        raise NoRunError(f"unable to find run {run_id!r}: {error.strerror}", error.errno) from error
    except OSError as error:
        raise failure(f"open run {run_id!r}", error) from error
    return _owned_by_us(fd, f"run {run_id!r}")


def is_path_of(spool_fd: int, run_id: str, run_fd: int) -> bool:
    """Whether the run directory at that name still is the one that was opened."""
    now = found(spool_fd, run_id)
    return now is not None and os.path.samestat(now, os.fstat(run_fd))
