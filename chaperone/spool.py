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

from . import jsontext, lease
from . import status as statuses
from .errors import NoRunError, SpoolError
from .spec import is_run_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 1
STREAMS = ("stdout", "stderr")
RESERVE = 16 * 1024  # bytes for the final status beyond what it repeats of the spec (rule W5)
LINE = 4_096  # bytes of a request: PIPE_BUF, up to which writers of one FIFO don't mix
JSON_LIMIT = 64 * 1024 * 1024  # bytes; a larger JSON file is not ours, and reading it could eat the reader's memory
RUNNING, ENDED, CONNECT, LAUNCHER, LAUNCHER_LOCK = ".running", ".ended", ".connect", ".launcher", ".launcher.lock"
NEW, GONE = ".new", ".gone"
SPEC, LOCK, CONTROL, LOG = "spec.json", "lock", "control", "log"
LIVE_STATUS, FINAL_STATUS, RESERVED, BUILDING = "running.json", "status.json", ".status", ".running.json"
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
        SpoolError: If it is not there, is no directory, belongs to someone else, or others may write to it.
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
            raise SpoolError(f"unable to use spool {path!r}: want it owned by uid {os.geteuid()}, got uid {ours.st_uid}", errno.EPERM)
        if ours.st_mode & 0o022:
            raise SpoolError(f"unable to use spool {path!r}: want nobody else to write to it, got mode {ours.st_mode & 0o7777:04o}", errno.EPERM)
        for name in (RUNNING, ENDED) if create else ():
            make_directory(name, fd)
    except OSError as error:
        os.close(fd)
        raise error if isinstance(error, SpoolError) else failure(f"use spool {path!r}", error) from error
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
    if os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        raise SpoolError(f"unable to use {name!r} of the spool: want it owned by uid {os.geteuid()}", errno.EPERM)
    return fd


def _entries(spool_fd: int, name: str) -> list[str]:
    try:
        fd = open_entries(spool_fd, name)
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


def has_lock(spool_fd: int, run_id: str) -> bool:
    """Whether a run's lock is there, held or not: it goes with the last step of an ending."""
    return found(spool_fd, f"{run_id}/{LOCK}") is not None


def hidden_directories(spool_fd: int, kind: str) -> list[str]:
    """The names of run directories that are being built (NEW) or deleted (GONE), or whose maker died at it."""
    # .RUNID.RANDOM: `.launcher.new` is a socket that is being made.
    return sorted(name for name in os.listdir(spool_fd) if name.startswith(".") and name.endswith(kind) and name.count(".") > 2)


def where_entered(spool_fd: int, run_id: str) -> str | None:
    """Where the id stands: RUNNING, ENDED, or None if it is in neither, for it was collected; costs the same however many there are."""
    # In the order in which the entries move: one that is moving is seen in either.
    return next((where for where in (RUNNING, ENDED) if found(spool_fd, f"{where}/{run_id}")), None)


def collect(spool_fd: int, run_id: str) -> None:
    """
    Take the entry of a run that has ended out of .ended/; nothing to do when it is not there.

    If its chaperone was killed before it could move the entry, it is taken out of .running/: else the run would come back
    for the next follower, who would deliver its end a second time.
    """
    if not is_run_id(run_id) or remove_entry(spool_fd, ENDED, run_id):
        return
    try:
        run_fd = open_run(spool_fd, run_id)
    except NoRunError:
        return
    try:
        ended = pulse(run_fd) is not True and read_final(run_fd, run_id) is not None
    finally:
        os.close(run_fd)
    if ended and not remove_entry(spool_fd, ENDED, run_id):  # once more: between our two looks it may have been moved there
        remove_entry(spool_fd, RUNNING, run_id)


def remove_entry(spool_fd: int, name: str, run_id: str) -> bool:
    """Take an entry out of RUNNING or ENDED; False if it is not there."""
    try:
        fd = open_entries(spool_fd, name)
        try:
            os.unlink(run_id, dir_fd=fd)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise error if isinstance(error, SpoolError) else failure(f"remove the entry of run {run_id!r} in {name!r}", error) from error
    return True


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
        SpoolError: If it can't be opened (the control FIFO: ENXIO when nobody reads it), or is a planted link or someone else's.
    """
    try:
        fd = os.open(name, flags | FILE, 0o600, dir_fd=directory_fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise failure(f"open {name!r}", error) from error
    ours, kind = os.fstat(fd), stat.S_IFIFO if name == CONTROL else stat.S_IFREG
    if stat.S_IFMT(ours.st_mode) != kind or ours.st_uid != os.geteuid() or ours.st_nlink > 1:
        os.close(fd)
        raise SpoolError(f"unable to open {name!r}: want a {'FIFO' if kind == stat.S_IFIFO else 'file'} of ours without other links", errno.EPERM)
    return fd


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
        SpoolError: If it is no directory of ours.
    """
    if not is_run_id(run_id):
        raise NoRunError(f"unable to find run {run_id!r}: that is no run id", errno.ENOENT)
    try:
        fd = os.open(run_id, DIRECTORY, dir_fd=spool_fd)
    except FileNotFoundError as error:
        raise NoRunError(f"unable to find run {run_id!r}: {error.strerror}", error.errno) from error
    except OSError as error:
        raise failure(f"open run {run_id!r}", error) from error
    if os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        raise SpoolError(f"unable to use run {run_id!r}: want it owned by uid {os.geteuid()}", errno.EPERM)
    return fd


def is_path_of(spool_fd: int, run_id: str, run_fd: int) -> bool:
    """Whether the run directory at that name still is the one that was opened."""
    now = found(spool_fd, run_id)
    return now is not None and os.path.samestat(now, os.fstat(run_fd))


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


def read_final(run_fd: int, run_id: str) -> dict[str, Any] | None:
    """The published final status; None where there is none."""
    return statuses.final_known(_read_json(run_fd, FINAL_STATUS), run_id)


def ended_at(run_fd: int) -> float | None:
    """When a final status was published, seconds since the epoch; None if none was."""
    final = found(run_fd, FINAL_STATUS)
    return None if final is None else final.st_mtime


def read_live(run_fd: int, run_id: str) -> dict[str, Any]:
    """The last status of a run that has not ended, as far as it can be read."""
    status = statuses.last_known(_read_json(run_fd, LIVE_STATUS), run_id)
    return {**status, "state": status["state"] if status["state"] in statuses.LIVE else "running"}  # a final state only where it is published


def look(run_fd: int, run_id: str) -> tuple[bool, dict[str, Any]]:
    """
    The state of a run as a reader may conclude it (rules R1 and R3).

    Args:
        run_fd (int): From `open_run`.
    Returns:
        tuple: Whether its chaperone lives, and a status; `lost` or `unattended` where that has to be concluded.
    Raises:
        NoRunError: If the run directory is being deleted.
        SpoolError: If somebody planted in it what is not ours.
    """
    for again in (False, True):
        alive = pulse(run_fd)
        final = read_final(run_fd, run_id)
        status = read_live(run_fd, run_id)
        if final is not None:
            return False, final
        if not alive or status["create_time"] is not None or again:
            break  # else it may have ended between our looks: then now status.json is there
    if alive:
        return True, status
    spec = read_spec(run_fd)
    if not spec and pulse(run_fd) is None:  # gc takes lock and spec away before status.json, whatever was there at our first look
        raise NoRunError(f"unable to look into run {run_id!r}: it is being deleted", errno.ENOENT)
    if leased_s(run_fd, spec, status["boot_id"]) > 0:
        return False, statuses.unattended(status)
    return False, statuses.lost(status, statuses.DIED)


def leased_s(run_fd: int, spec: dict[str, Any], boot: str | None) -> float:
    """As `lease.left_s`, by the times of the lock, which the chaperone touches whenever it hears from the far side."""
    lock = found(run_fd, LOCK)
    return 0.0 if lock is None else lease.left_s(lock, spec, boot)


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
    data = line.encode("utf-8", "backslashreplace") + b"\n"
    if data.count(b"\n") > 1 or len(data) > LINE:
        raise SpoolError(f"unable to ask run {run_id!r}: want one line of at most {LINE} bytes", errno.EINVAL)
    try:
        fd = open_plain(run_fd, CONTROL, os.O_WRONLY)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT):
            raise NoRunError(f"unable to ask run {run_id!r}: no chaperone is there", error.errno) from error
        if isinstance(error, SpoolError):
            raise
        raise failure(f"ask run {run_id!r}", error) from error
