"""
The on-disk format of a spool, version 1: the only module that knows a file name.

    SPOOL/                 one scheduler's runs; 0700, on a local filesystem
      .running/RUNID       a symlink to ../RUNID for each live run
      .ended/RUNID         the same entry, moved here when the run has ended, until it is collected
      .RUNID.RANDOM.new/   being built      .RUNID.RANDOM.gone/   being deleted
      .receive/RUNID       what a receiver knows of a run that it expects
      .mirror/HASH         locked by the mirror of one agent's spool
      RUNID/               0700, files 0600; complete from the moment it is visible
        spec.json          what to run and how, with the run's key; written once
        lock               locked (flock) by the chaperone as long as it lives: its pulse
        control            FIFO: requests to the chaperone, one a line
        running.json       the status so far; replaced whole
        .status            room reserved for the final status
        stdout stderr log  append-only bytes
        timeline           when they came, where the spec asks for it; append-only lines
        callback           what an agent that posts the run has done; append-only lines
        status.json        the final status; it exists if and only if the run has ended

docs/spool-format.rst has the rules W1-W5 and R1-R6 that this module keeps.
Knows: files, locks, JSON.  Must not know: processes, signals, ssh, the clock.
"""

from __future__ import annotations

import errno

from ..cpython import os, stat
from ..errors import NoRunError, SpoolError
from ..model import jsontext
from ..model.spec import is_run_id
from ..program.fds import owned, read_all
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
RECEIVE = ".receive"
MIRROR = ".mirror"
NEW = ".new"
GONE = ".gone"
# In a run directory
SPEC = "spec.json"
LOCK = "lock"
CONTROL = "control"
LOG = "log"
TIMELINE = "timeline"
CALLBACK = "callback"
LIVE_STATUS = "running.json"
BUILDING = ".running.json"
RESERVED = ".status"
FINAL_STATUS = "status.json"
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def failure(verb: str, error: OSError) -> SpoolError:
    """The error for a system call that failed: `unable to VERB: reason`."""
    return SpoolError(f"unable to {verb}: {error.strerror}", error.errno)


def found(directory_fd: int, name: str) -> os.stat_result | None:
    """The stat result of a name, without following a symlink; None if there is no such name."""
    try:
        return os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None


# -- the spool


def open_spool(path: str, create: bool = False) -> int:
    """
    Open a spool.

    Args:
        path (str): Absolute or relative. A symlink to the spool is followed, but none inside it.
        create (bool): Make the spool, 0700, if it is missing; its parent must exist.
    Returns:
        int: The fd of the directory; the caller closes it.
    Raises:
        SpoolError: If it is missing, is not a directory, belongs to another user, or others may
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
                f"unable to use spool {path!r}: want it writable only by its owner,"
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
    """Make a directory, 0700; does nothing if the name exists."""
    try:
        os.mkdir(path, 0o700, dir_fd=dir_fd)
    except FileExistsError:
        pass


def open_entries(spool_fd: int, name: str) -> int:
    """
    Open `.running`, `.ended` or `.connect`; never what a planted symlink points to.

    Returns:
        int: The fd of the directory; the caller closes it.
    Raises:
        FileNotFoundError: If it is missing.
        SpoolError: If it is not a directory of this user.
    """
    try:
        fd = os.open(name, DIRECTORY, dir_fd=spool_fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise failure(f"open {name!r} of the spool", error) from error
    return _owned_by_us(fd, f"{name!r} of the spool")


def _owned_by_us(fd: int, what: str) -> int:
    """The same fd; if another user owns the directory, it is closed and SpoolError is raised."""
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
    """The ids in .ended/: runs that have ended and are not collected."""
    return _entries(spool_fd, ENDED, prefixes)


def all_ids(spool_fd: int, prefixes: tuple[str, ...] = ("",)) -> list[str]:
    """The ids of all run directories, also of collected runs; the cost grows with the history."""
    return _ids(spool_fd, prefixes)


def count_others(spool_fd: int, prefixes: tuple[str, ...], known: set[str]) -> int:
    """How many run directories there are beside known ones: sorting them would double the cost."""
    return sum(
        name.startswith(prefixes) and name not in known and is_run_id(name)
        for name in os.listdir(spool_fd)
    )


def has_lock(spool_fd: int, run_id: str) -> bool:
    """Whether a run has its lock file, locked or not; the last step of an ending deletes it."""
    return found(spool_fd, f"{run_id}/{LOCK}") is not None


def hidden_directories(spool_fd: int, kind: str) -> list[str]:
    """
    The names of run directories that are being built (NEW) or deleted (GONE), also of those that a
    dead process left so.
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
    Which directory has the entry of a run: RUNNING, ENDED, or None if the run was collected. The
    cost does not grow with the number of entries.
    """
    # An ending moves the entry, and then deletes the lock. If a run has ended completely and is in
    # RUNNING, another starter of its id left the entry there and died.
    # Look for the lock first: in the other order, a run that ends between our two looks would seem
    # to be collected.
    is_over = not has_lock(spool_fd, run_id) and found(spool_fd, f"{run_id}/{FINAL_STATUS}")
    # In the order in which entries move: so an entry that is being moved is found.
    places = (ENDED,) if is_over else (RUNNING, ENDED)
    return next((where for where in places if found(spool_fd, f"{where}/{run_id}")), None)


def is_entered(spool_fd: int, run_id: str) -> bool:
    """Whether a run has an entry; cheaper than `where_entered` if it is in ENDED."""
    return bool(found(spool_fd, f"{ENDED}/{run_id}") or where_entered(spool_fd, run_id))


def remove_entry(spool_fd: int, name: str, run_id: str) -> bool:
    """Remove an entry from RUNNING or ENDED; False if it is not there."""
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
    Remove an entry that no run needs from .running/.

    This is done only while no starter works (rule W1): an entry appears a moment before its run,
    and two starters of one id share an entry. Otherwise the entry stays for the next `reap`.

    Args:
        running_fd (int): Of .running/. Its lock is taken exclusively; a shared one may be lost.
    Returns:
        bool: Whether it was removed: its run does not exist, or has ended completely.
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
    Open a file of a run directory.

    Args:
        flags (int): As for open(2).
    Returns:
        int: Its fd; the caller closes it.
    Raises:
        FileNotFoundError: If it is missing.
        SpoolError: If it can't be opened (the control FIFO: ENXIO if no process reads it), is a
            planted link, or belongs to another user.
    """
    try:
        fd = os.open(name, flags | FILE, 0o600, dir_fd=directory_fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise failure(f"open {name!r}", error) from error
    ours, kind = os.fstat(fd), stat.S_IFIFO if name == CONTROL else stat.S_IFREG
    is_ours = stat.S_IFMT(ours.st_mode) == kind and ours.st_uid == os.geteuid()
    # A second link belongs to a backup (`cp -al`, rsnapshot); or it was planted, by a user who may
    # write to this directory.
    if not is_ours or (ours.st_nlink > 1 and os.fstat(directory_fd).st_mode & 0o022):
        os.close(fd)
        want = "FIFO" if kind == stat.S_IFIFO else "file"
        raise SpoolError(
            f"unable to open {name!r}: want a {want} of this user without other hard links",
            errno.EPERM,
        )
    return fd


def create_plain(directory_fd: int, name: str, flags: int = os.O_WRONLY) -> int:
    """Create a new file, and return its fd; the caller closes it."""
    return os.open(name, flags | os.O_CREAT | os.O_EXCL | FILE, 0o600, dir_fd=directory_fd)


def replace(directory_fd: int, name: str, data: bytes) -> None:
    """
    Write a whole file beside the runs, so that a power failure leaves the old one or the new one.

    Raises:
        SpoolError: If the disk refuses it; then the old one stays.
    """
    new = f".{os.urandom(8).hex()}{NEW}"
    try:
        with owned(create_plain(directory_fd, new)) as fd:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        os.rename(new, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    except OSError as error:
        unlink(new, directory_fd)
        raise failure(f"write {name!r}", error) from error


def unlink(name: str, dir_fd: int) -> None:
    """Delete a file; a failure is ignored."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except OSError:  # `reap` deletes a file that is left here; it never hides the status
        pass


def remove_tree(spool_fd: int, name: str) -> None:
    """Delete a directory that contains only files; a failure is ignored."""
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
    """The JSON value of a file; None if the file is missing, torn or not JSON."""
    try:
        with owned(open_plain(directory_fd, name)) as fd:
            text = read_all(fd, jsontext.LIMIT)
        return None if len(text) > jsontext.LIMIT else jsontext.loads(text)
    except (FileNotFoundError, ValueError):
        return None


# -- run directories, as a reader opens them


def open_run(spool_fd: int, run_id: str) -> int:
    """
    Open a run directory.

    Returns:
        int: The fd of the directory; the caller closes it.
    Raises:
        NoRunError: If there is no such run.
        SpoolError: If it is not a directory of this user.
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
    """Whether the run directory with this name is still the one that was opened."""
    now = found(spool_fd, run_id)
    return now is not None and is_same_file(now, os.fstat(run_fd))


def is_same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether two looks met the same file, whatever its names."""
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
