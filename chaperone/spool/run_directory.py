"""
A run directory as its chaperone holds it: how it appears, what is written into it, how it ends.

Knows: the order of the writes (rules W1-W5).  Must not know: processes, signals, ssh, the clock.
"""

from __future__ import annotations

import errno

from ..cpython import os
from ..errors import RunExistsError, SpecError, SpoolError
from ..model import jsontext, transitions
from ..program.fds import owned
from . import format, locks, look

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..program.guard import Guard
    from .timeline import Timeline

# Bytes of the log that are kept while the disk refuses them: some hundred lines.
UNWRITTEN_BYTES = 65_536


class RunDirectory:
    """
    A run directory as its chaperone holds it: locked before it is visible, and until its last file
    is written.

    Attributes:
        run_id (str): Its name.
        key (str): Random; it distinguishes the run from a later one with the same id.
        streams (dict): `stdout` and `stderr` to fds, O_APPEND.
        log_fd, control_fd (int): The log, O_APPEND; the FIFO, read and write, non-blocking.
        path (str): Below the path of the spool as it was given, for programs that open a file by
            name.
        started_at (float): For an adopted run: when its program was started, on the monotonic clock
            of this boot; None if that is not known.
        timeline (Timeline): Closed with the run; None if the run has none.
    """

    def __init__(
        self, spool_fd: int, path: str, run_id: str, key: str, fd: int, lock_fd: int
    ) -> None:
        """
        `create` and `take_over` make it. It closes `fd` and `lock_fd`, and keeps a copy of
        `spool_fd`.
        """
        self.spool_fd = os.dup(spool_fd)
        self.path = path
        self.run_id = run_id
        self.key = key
        self.fd = fd
        self.lock_fd = lock_fd
        self.log_fd = -1
        self.control_fd = -1
        self._reserved_fd = -1
        self.streams: dict[str, int] = {}
        self.room = 0
        self._unwritten = b""
        self.started_at: float | None = None
        self.timeline: Timeline | None = None

    @property
    def log_path(self) -> str:
        return f"{self.path}/{format.LOG}"

    def tell(self, line: bytes) -> bool:
        """
        Append a line to the log. If the disk refuses it, it is tried again with the next line and
        at the end of the run; at most UNWRITTEN_BYTES are kept.

        Args:
            line (bytes): With its newline; b"" to try only what was refused before.
        Returns:
            bool: Whether the disk took everything.
        """
        self._unwritten += line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self.log_fd, self._unwritten) :]
        except OSError:
            # Whole lines, so that no later one is appended to half a line.
            end = self._unwritten.rfind(b"\n", 0, UNWRITTEN_BYTES) + 1
            self._unwritten = self._unwritten[:end]
            return False
        return True

    def hand_to(self, guard: Guard, max_bytes: int | None) -> None:
        """
        Give the guard the streams and the log, so that it can go on if this chaperone dies; and an
        fd of `lock` for its word, opened again and therefore without the lock.

        Args:
            max_bytes (int): How much of a stream is kept; None for all.
        """
        with owned(format.open_plain(self.fd, format.LOCK, os.O_WRONLY | os.O_APPEND)) as word:
            guard.take_run([*self.streams.values(), self.log_fd, word], max_bytes)

    def guards_word(self) -> list[int] | None:
        """The pids that a dead chaperone's guard could not kill; None if it left no word."""
        line, end, _ = os.pread(self.lock_fd, 65_536, 0).partition(b"\n")
        first, *rest = line.split() or [b""]
        if not end or first != b"left" or not all(word.isdigit() for word in rest):
            return None
        return [int(word) for word in rest]

    def open_stream(self, stream: str) -> int:
        """
        One more fd of a stream, O_APPEND, for the program itself; the caller closes it.
        """
        fd = format.open_plain(self.fd, stream, os.O_WRONLY | os.O_APPEND)
        # Without O_NONBLOCK: we need it only against planted FIFOs, the program must not have it.
        os.set_blocking(fd, True)
        return fd

    def replace_running(self, status: dict[str, Any]) -> str | None:
        """
        Replace running.json. If that fails the old one stays, because bookkeeping must not harm the
        run (rule W5).

        Returns:
            str: Why it failed; None if it did not.
        """
        try:
            try:
                fd = format.create_plain(self.fd, format.BUILDING)
            # It is left from a chaperone that was killed here, or planted: never write into it.
            except FileExistsError:
                os.unlink(format.BUILDING, dir_fd=self.fd)
                fd = format.create_plain(self.fd, format.BUILDING)
            with owned(fd):
                _write_all(fd, (jsontext.dumps(status) + "\n").encode())
            os.rename(format.BUILDING, format.LIVE_STATUS, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError as error:
            format.unlink(format.BUILDING, self.fd)
            return f"unable to replace {format.LIVE_STATUS!r}: {error.strerror}"
        return None

    def publish(self, status: dict[str, Any], durable: bool = False) -> None:
        """
        Publish the final status, after the end of each stream (rules W3 and W4). It is written into
        the room that was reserved for it.

        Raises:
            OSError: If it can't be published; then the run has no final status.
        """
        if self.timeline is not None:
            self.timeline.end()
        self._find_reserved()
        text = transitions.fitted(status, self.room).encode()
        view, offset = memoryview(text), 0
        while offset < len(text):
            offset += os.pwrite(self._reserved_fd, view[offset:], offset)
        os.ftruncate(self._reserved_fd, len(text))
        lines = () if self.timeline is None else (self.timeline.fd,)
        for fd in (*self.streams.values(), *lines, self._reserved_fd):
            # An empty stream has nothing to lose, and each fsync writes to the journal.
            if os.fstat(fd).st_size:
                _sync(fd)
        os.rename(format.RESERVED, format.FINAL_STATUS, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        if durable:
            _sync(self.fd)

    def _find_reserved(self) -> None:
        """
        If `.status` was removed or replaced, make it again: a status in an unlinked file could not
        be published.
        """
        there = format.found(self.fd, format.RESERVED)
        if there is None or not format.is_same_file(there, os.fstat(self._reserved_fd)):
            format.unlink(format.RESERVED, self.fd)
            fd = format.create_plain(self.fd, format.RESERVED, os.O_RDWR)
            os.close(self._reserved_fd)
            self._reserved_fd = fd

    def end(self, durable: bool = False) -> None:
        """
        Delete what only a live run has, move its entry to .ended/, unlock last (rule W4).

        The outcome is published, so nothing raises here. If the entry can't be moved, the lock file
        stays, and `reap` finishes the ending.
        """
        for name in (format.CONTROL, format.LIVE_STATUS, format.BUILDING, format.RESERVED):
            format.unlink(name, self.fd)
        self.tell(b"")
        if os.fstat(self.log_fd).st_size == 0:
            format.unlink(format.LOG, self.fd)
        if self._move_entry(durable):
            format.unlink(format.LOCK, self.fd)
        self.close()

    def _move_entry(self, durable: bool) -> bool:
        """
        Move the entry from .running/ to .ended/. If it is not there, it was collected already: the
        status was visible before.
        """
        try:
            with (
                owned(format.open_entries(self.spool_fd, format.RUNNING)) as running_fd,
                owned(format.open_entries(self.spool_fd, format.ENDED)) as ended_fd,
            ):
                os.rename(self.run_id, self.run_id, src_dir_fd=running_fd, dst_dir_fd=ended_fd)
                if durable:
                    _sync(ended_fd)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close every fd; the lock is last, and ends the pulse."""
        if self.timeline is not None:
            self.timeline.close()
            self.timeline = None
        for fd in self.streams.values():
            os.close(fd)
        self.streams = {}
        for name in ("log_fd", "control_fd", "_reserved_fd", "fd", "spool_fd", "lock_fd"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)

    def size_of(self, stream: str) -> int:
        """The length of a stream on disk, in bytes."""
        return os.fstat(self.streams[stream]).st_size

    def has_entry(self) -> bool:
        """Whether the run has an entry, in .running/ or in .ended/."""
        return format.where_entered(self.spool_fd, self.run_id) is not None

    def enter(self) -> None:
        """Make the entry in .running/ again if it is missing; `end` moves it to .ended/."""
        with owned(format.open_entries(self.spool_fd, format.RUNNING)) as fd:
            _enter(fd, self.run_id)

    def is_there(self) -> bool:
        """
        Whether the run directory still exists: nothing can be published in a removed one.
        """
        return os.fstat(self.fd).st_nlink > 0

    def is_in_place(self) -> bool:
        """Whether its path still leads to it; True if that can't be known."""
        try:
            return format.is_same_file(os.stat(self.path), os.fstat(self.fd))
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENOTDIR)

    def touch(self) -> None:
        """Record that the far side was heard now, in the times of `lock`."""
        look.mark(self.lock_fd)

    def mark_start(self, monotonic_s: float) -> None:
        """
        Record when the program was started, for a chaperone that adopts the run: in the atime of
        `.status`. Nothing reads that file, so nothing else changes its atime.
        """
        try:
            os.utime(self._reserved_fd, (monotonic_s, os.fstat(self._reserved_fd).st_mtime))
        except OSError:  # then a chaperone that adopts the run uses the wall clock
            pass

    def read_start(self) -> None:
        """Read what `mark_start` recorded; it is valid in the same boot of this host."""
        self.started_at = os.fstat(self._reserved_fd).st_atime

    def is_ended(self) -> bool:
        """Whether the final status is published; while we hold the lock, the answer stays true."""
        return look.read_final(self.fd, self.run_id) is not None

    def open_files(self, flags: int) -> None:
        """
        Open the files that a chaperone writes to; O_CREAT makes missing ones, O_EXCL refuses
        existing ones.
        """
        for stream in format.STREAMS:
            self.streams[stream] = format.open_plain(
                self.fd, stream, os.O_WRONLY | os.O_APPEND | flags
            )
            # The guard shares this lock, so `reap` and `adopt` wait until it has drained the pipes.
            locks.share(self.streams[stream])
        self.log_fd = format.open_plain(self.fd, format.LOG, os.O_WRONLY | os.O_APPEND | flags)
        try:
            os.mkfifo(format.CONTROL, 0o600, dir_fd=self.fd)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
        self.control_fd = format.open_plain(self.fd, format.CONTROL, os.O_RDWR)
        self._reserved_fd = format.open_plain(self.fd, format.RESERVED, os.O_RDWR | flags)
        self.room = max(os.fstat(self._reserved_fd).st_size, format.RESERVE)


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    # After EIO here, a power failure may lose bytes; to drop the outcome too would lose more.
    except OSError:
        pass


# -- how a run directory appears


def create(
    path: str,
    spec: dict[str, Any],
    secrets: dict[str, Any],
    status: dict[str, Any],
    key: str,
    made: Callable[[RunDirectory], None] = lambda run: None,
) -> RunDirectory:
    """
    Make a run directory visible, locked from the start (rule W1). The rename decides which of
    several starters of an id wins.

    Args:
        path (str): The spool's path, absolute; the spool is made if it is missing.
        spec (dict): Canonical, with its `id`, as it is kept in spec.json.
        secrets (dict): The spec with its secrets: the final status repeats parts of it, and needs
            room for them.
        status (dict): `starting`.
        key (str): Random; it stays with the run.
        made: Called when all files exist, before a reader can see them.
    Returns:
        RunDirectory: Visible and locked.
    Raises:
        RunExistsError: If there is a run with that id.
        SpecError: If spec.json would be too large to be read again.
        SpoolError: If it can't be created; nothing is left behind.
    """
    run_id = spec["id"]
    try:
        with owned(format.open_spool(path, create=True)) as spool_fd:
            if format.found(spool_fd, run_id):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            return _appear(spool_fd, path, spec, secrets, status, key, made)
    except SpoolError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            sentence = f"unable to create run {run_id!r}: it exists"
            raise RunExistsError(sentence, errno.EEXIST) from error
        raise format.failure(f"create run {run_id!r} in spool {path!r}", error) from error


def _appear(
    spool_fd: int,
    path: str,
    spec: dict[str, Any],
    secrets: dict[str, Any],
    status: dict[str, Any],
    key: str,
    made: Callable[[RunDirectory], None],
) -> RunDirectory:
    run_id = spec["id"]
    # Not by the key: a start that is repeated has the same, and the first may still be building.
    building = f".{run_id}.{os.urandom(8).hex()}{format.NEW}"
    run = None
    with owned(format.open_entries(spool_fd, format.RUNNING)) as running_fd:
        locks.share(running_fd)
        try:
            run = _build(spool_fd, f"{path}/{run_id}", building, spec, secrets, status, key)
            made(run)
            _enter(running_fd, run_id)
            os.rename(building, run_id, src_dir_fd=spool_fd, dst_dir_fd=spool_fd)
        except BaseException:
            if run is not None:
                run.close()
            format.remove_tree(spool_fd, building)
            format.sweep_entry(spool_fd, running_fd, run_id)
            raise
        if spec["durable"]:
            _sync(running_fd)
            _sync(spool_fd)
    return run


def _build(
    spool_fd: int,
    path: str,
    building: str,
    spec: dict[str, Any],
    secrets: dict[str, Any],
    status: dict[str, Any],
    key: str,
) -> RunDirectory:
    os.mkdir(building, 0o700, dir_fd=spool_fd)
    run = RunDirectory(
        spool_fd, path, spec["id"], key, os.open(building, format.DIRECTORY, dir_fd=spool_fd), -1
    )
    try:
        # Lock before a reader can see it: a follower's probe could make our own attempt fail.
        run.lock_fd = format.create_plain(run.fd, format.LOCK, os.O_RDWR)
        locks.take(run.lock_fd)
        os.utime(run.lock_fd, look.stamp())
        text = (jsontext.dumps({"version": format.VERSION, "key": key, **spec}) + "\n").encode()
        if len(text) > jsontext.LIMIT:  # it could not be read again
            want = f"want {jsontext.WITHIN_LIMIT} in {format.SPEC!r}"
            raise SpecError(f"unable to create run {spec['id']!r}: {want}, got {len(text)} bytes")
        with owned(format.create_plain(run.fd, format.SPEC)) as spec_fd:
            _write_all(spec_fd, text)
            if spec["durable"]:
                os.fsync(spec_fd)
        run.open_files(os.O_CREAT | os.O_EXCL)
        if spec["output"]["timeline"]:
            os.close(format.create_plain(run.fd, format.TIMELINE))
        # The status repeats argv, cwd, names and labels, and over ssh the connection's argv: at
        # most about twice the text of the spec.
        run.room = format.RESERVE + 2 * len(jsontext.dumps(secrets))
        os.posix_fallocate(run._reserved_fd, 0, run.room)
        unwritten = run.replace_running(status)
        if unwritten:
            raise SpoolError(f"unable to create run {spec['id']!r}: {unwritten}", errno.ENOSPC)
        if spec["durable"]:
            os.fsync(run.fd)
    except BaseException:
        run.close()
        raise
    return run


def _enter(running_fd: int, run_id: str) -> None:
    try:
        os.symlink(f"../{run_id}", run_id, dir_fd=running_fd)
    # It is from another starter of the id, dead or alive. No reap deletes it while we share the
    # lock of .running/.
    except FileExistsError:
        pass


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
