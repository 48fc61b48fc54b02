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
        status.json        the final status: there if and only if the run has ended

The rules W1-W5 and R1-R6 that this module keeps are told in docs/spool-format.rst.
Knows: files, locks, JSON.  Must not know: processes, signals, ssh, the clock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from . import jsontext
from . import status as statuses
from .errors import NoRunError, SpoolError
from .spec import is_run_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 1
STREAMS = ("stdout", "stderr")
RESERVE = 16 * 1024  # bytes for the final status beyond what it repeats of the spec (rule W5)
JSON_LIMIT = 64 * 1024 * 1024  # bytes; a larger JSON file is not ours, and reading it could eat the reader's memory
RUNNING, ENDED, CONNECT, LAUNCHER, LAUNCHER_LOCK = ".running", ".ended", ".connect", ".launcher", ".launcher.lock"
SPEC, LOCK, CONTROL, LOG = "spec.json", "lock", "control", "log"
LIVE_STATUS, FINAL_STATUS, RESERVED, BUILDING = "running.json", "status.json", ".status", ".running.json"
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def failure(verb: str, error: OSError) -> SpoolError:
    return SpoolError(f"unable to {verb}: {error.strerror}", error.errno)


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
        SpoolError: If it is not there, is no directory, belongs to someone else, or others may write to it.
    """
    try:
        if create:
            make_directory(path, None)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise failure(f"open spool {path!r}", error) from error
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            raise SpoolError(f"unable to use spool {path!r}: want it owned by uid {os.geteuid()}, got uid {found.st_uid}", errno.EPERM)
        if found.st_mode & 0o022:
            raise SpoolError(f"unable to use spool {path!r}: want nobody else to write to it, got mode {found.st_mode & 0o7777:04o}", errno.EPERM)
        if create:
            for name in (RUNNING, ENDED):
                make_directory(name, fd)
    except OSError as error:
        os.close(fd)
        raise error if isinstance(error, SpoolError) else failure(f"use spool {path!r}", error) from error
    return fd


def make_directory(path: str, dir_fd: int | None) -> None:
    try:
        os.mkdir(path, 0o700, dir_fd=dir_fd)
    except FileExistsError:
        pass


def _entries(spool_fd: int, name: str) -> list[str]:
    try:
        fd = os.open(name, DIRECTORY, dir_fd=spool_fd)
    except FileNotFoundError:
        return []
    try:
        return sorted(entry for entry in os.listdir(fd) if is_run_id(entry))
    finally:
        os.close(fd)


def live_ids(spool_fd: int) -> list[str]:
    """The ids in .running/: live runs, runs about to appear, and runs whose chaperone died."""
    return _entries(spool_fd, RUNNING)


def ended_ids(spool_fd: int) -> list[str]:
    """The ids in .ended/: runs that have ended and were not collected."""
    return _entries(spool_fd, ENDED)


def all_ids(spool_fd: int) -> list[str]:
    """The ids of all run directories, the collected ones too: costs as much as there is history."""
    return sorted(name for name in os.listdir(spool_fd) if is_run_id(name))


def is_live_entry(spool_fd: int, run_id: str) -> bool:
    """Whether the id is in .running/; costs the same however many there are."""
    try:
        os.stat(f"{RUNNING}/{run_id}", dir_fd=spool_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def collect(spool_fd: int, run_id: str) -> None:
    """Take an ended run's entry out of .ended/; nothing to do when it is not there."""
    try:
        os.unlink(f"{ENDED}/{run_id}", dir_fd=spool_fd)
    except FileNotFoundError:
        pass


# -- files in a run directory


def _plain(fd: int, name: str, kind: Any = stat.S_ISREG) -> int:
    """The fd, if it is a file of the kind we made; never a planted link to something else."""
    found = os.fstat(fd)
    if not kind(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
        os.close(fd)
        raise SpoolError(f"unable to open {name!r}: want a {'FIFO' if kind is stat.S_ISFIFO else 'file'} of ours without other links", errno.EPERM)
    return fd



def open_plain(directory_fd: int, name: str, flags: int = os.O_RDONLY) -> int:
    return _plain(os.open(name, flags | FILE, dir_fd=directory_fd), name)



def _read_json(directory_fd: int, name: str) -> object:
    """The value, or None where the file is missing, torn or no JSON."""
    try:
        fd = open_plain(directory_fd, name)
    except FileNotFoundError:
        return None
    try:
        if os.fstat(fd).st_size > JSON_LIMIT:
            return None
        with open(fd, "rb", closefd=False) as file:
            return jsontext.loads(file.read())
    except ValueError:
        return None
    finally:
        os.close(fd)


# -- how a reader looks


def open_run(spool_fd: int, run_id: str) -> int:
    """
    Open a run directory to look into it.

    Returns:
        int: A directory's fd; the caller closes it.
    Raises:
        NoRunError: If it is not there.
    """
    try:
        return os.open(run_id, DIRECTORY, dir_fd=spool_fd)
    except OSError as error:
        raise NoRunError(f"unable to find run {run_id!r}: {error.strerror}", error.errno) from error


def is_path_of(spool_fd: int, run_id: str, run_fd: int) -> bool:
    """Whether the run directory at that name still is the one that was opened."""
    try:
        return os.path.samestat(os.stat(run_id, dir_fd=spool_fd, follow_symlinks=False), os.fstat(run_fd))
    except FileNotFoundError:
        return False


def pulse(run_fd: int) -> bool | None:
    """
    Whether the chaperone lives: a probe that disturbs neither it nor other probes (rule R4).

    Returns:
        bool: True while the lock is held, False when it is free; None when there is no lock any more.
    """
    try:
        fd = open_plain(run_fd, LOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def read_spec(run_fd: int) -> dict[str, Any]:
    """The spec with `version` and `key`; {} where it can't be read."""
    value = _read_json(run_fd, SPEC)
    return value if isinstance(value, dict) else {}


def look(run_fd: int, run_id: str) -> tuple[bool, dict[str, Any]]:
    """
    The state of a run as a reader may conclude it (rules R1 and R3).

    Args:
        run_fd (int): From `open_run`.
    Returns:
        tuple: Whether its chaperone lives, and a status; `lost` or `unattended` where that has to be concluded.
    """
    status: dict[str, Any]
    while True:
        alive = pulse(run_fd)
        final = _read_json(run_fd, FINAL_STATUS)
        if isinstance(final, dict) and final.get("state") in statuses.FINAL:
            return False, statuses.last_known(final, run_id)
        status = statuses.last_known(_read_json(run_fd, LIVE_STATUS), run_id)
        if not alive or status["create_time"] is not None or _read_json(run_fd, FINAL_STATUS) is None:
            break  # else it ended between our looks: begin again
    if status["state"] in statuses.FINAL:
        status = {**status, "state": "running"}  # a final state is only believed where it is published
    if alive:
        return True, status
    if read_spec(run_fd).get("on_disconnect") == "survive":
        return False, statuses.unattended(status)
    return False, statuses.lost(status, "the chaperone died before the program's end was recorded")


def open_stream(run_fd: int, stream: str) -> int:
    """
    Open a stream to read it by offset.

    Raises:
        SpoolError, FileNotFoundError: If it is not there or not ours.
    """
    if stream not in (*STREAMS, LOG):
        raise SpoolError(f"unable to open stream {stream!r}: want stdout, stderr or log", errno.EINVAL)
    return open_plain(run_fd, stream)


def request(run_fd: int, run_id: str, line: str) -> None:
    """
    Write one line to a run's control FIFO.

    Args:
        line (str): Without newline: `stop 5 by=ops`.
    Raises:
        NoRunError: If no chaperone is there to read it.
        SpoolError: If it can't be written.
    """
    try:
        fd = _plain(os.open(CONTROL, os.O_WRONLY | FILE, dir_fd=run_fd), CONTROL, stat.S_ISFIFO)
        try:
            os.write(fd, line.encode() + b"\n")
        finally:
            os.close(fd)
    except OSError as error:
        if isinstance(error, SpoolError):
            raise
        if error.errno in (errno.ENXIO, errno.ENOENT):
            raise NoRunError(f"unable to ask run {run_id!r}: no chaperone is there", error.errno) from error
        raise failure(f"ask run {run_id!r}", error) from error
