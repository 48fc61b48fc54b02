"""
What a follower has open: one inotify instance for all that it watches, and one fd that is readable
when anything waits.

Knows: inotify, epoll, timers.  Must not know: what is in a run directory, or what an event means.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import errno
import heapq
import os
import select
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Hashable
from typing import Any

import inotify_simple
from inotify_simple import flags

from ..errors import SpoolError
from .timer import Timer

# Plain ints: an operation on flags of an enum costs thirty times as much, and there are some for
# each event.
MODIFY, CLOSE_WRITE, DELETE = int(flags.MODIFY), int(flags.CLOSE_WRITE), int(flags.DELETE)
MOVED_FROM, MOVED_TO = int(flags.MOVED_FROM), int(flags.MOVED_TO)
IGNORED, OVERFLOW, ONLYDIR = int(flags.IGNORED), int(flags.Q_OVERFLOW), int(flags.ONLYDIR)
MASK_ADD = int(flags.MASK_ADD)
# Some 2,000 events at once: the deeper the queue, the more of them share one read.
READ_BYTES = 64 * 1024

# Filesystems that other hosts, or another kernel, may write to: such a change reaches no inotify
# here. coreutils' `tail -f` polls on all of these. It polls on an overlay too, and we need not: a
# run directory is made and written through the overlay, and inotify reports that.
SILENT_FILESYSTEMS = frozenset(
    "9p acfs afs beegfs ceph cifs coda cvfs fuse fuseblk gfs2 gpfs ibrix lustre ncpfs nfs nfs4"
    " ocfs2 panfs prl_fs smb3 smbfs snfs vboxsf virtiofs vmhgfs vxfs".split()
)
# Local filesystems by the number that fstatfs(2) says, from linux/magic.h: to read mountinfo would
# be a fifth of what a new follower costs. FUSE has one number for all its kinds, so it is not here.
LOCAL_FILESYSTEMS = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0x794C7630: "overlay",
    0xF2F52010: "f2fs",
    0x2FC12FC1: "zfs",
}
STATFS_BYTES = 256  # more than a struct statfs has in any libc
_libc = ctypes.CDLL(None)

OUR_FDS = "/proc/self/fd"  # missing too where /proc shows a pid namespace that we are not in
TURN_S = 0.005  # how long an event loop's other tasks may have to wait for ours
# Where an event comes so soon after the last one, more gather before a task goes on: to go on for
# each takes twice the CPU (measured, 5,000 lines/s).
FAST_S, GATHER_S = 0.001, 0.002
LONGEST_WAIT_S = 86_400.0  # epoll_wait(2) takes milliseconds in an int: 24.8 days are its end


class OutOfWatchesError(SpoolError):
    """The kernel grants this user no further watch."""


class NoInotifyError(SpoolError):
    """
    inotify can't be used: the kernel grants this user no further instance, or this process no
    further fd; or there is no /proc of ours, by which a directory that is open is named.
    """


def silent_filesystem(fd: int) -> str | None:
    """
    Whether inotify may miss changes on a filesystem.

    Args:
        fd (int): Of anything on it.
    Returns:
        str: The filesystem's name, if it is one that other hosts may write to; None if inotify
            reports everything, or where /proc is missing and the name can't be known.
    """
    name = _filesystem(fd)
    return name if name.partition(".")[0] in SILENT_FILESYSTEMS else None  # `fuse.sshfs`


def _filesystem(fd: int) -> str:
    """
    The name of the filesystem that an fd is on, as mount(8) has it; "" where it is not known.

    The type is the first field of a struct statfs. It has 32 or 64 bits: where its first half is
    not the number, that is none of ours.

    Source: fstatfs(2).
    """
    found = ctypes.create_string_buffer(STATFS_BYTES)
    if _libc.fstatfs(fd, found):
        return ""
    number = int.from_bytes(found.raw[:4], sys.byteorder)
    return LOCAL_FILESYSTEMS.get(number) or _mounted_filesystem(fd)


def _mounted_filesystem(fd: int) -> str:
    """
    As `_filesystem`, by the number of its mount, because mountinfo does not have the device of a
    file on btrfs.

    Source: proc_pid_fdinfo(5), proc_pid_mountinfo(5).
    """
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
            number = next(line.split()[1] for line in file if line.startswith("mnt_id:"))
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            mount = next(line for line in file if line.startswith(f"{number} "))
    except (OSError, StopIteration):
        return ""
    return mount.rpartition(" - ")[2].split()[0]


def _limit(name: str) -> str:
    """The value of a sysctl."""
    try:
        with open(f"/proc/sys/{name.replace('.', '/')}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


def _watch_limit() -> str:
    """
    The sysctl that grants us the fewest watches: in a container the one of its user namespace may
    be lower than the host's.
    """
    return min(
        ("fs.inotify.max_user_watches", "user.max_inotify_watches"),
        key=lambda name: int(_limit(name)) if _limit(name).isdigit() else 2**63,
    )


class Watcher:
    """
    What the kernel reports: changes in watched directories, and deadlines that have passed.

    All of it makes `fileno()` readable. Without inotify (`reports` is false) there are deadlines
    only.
    """

    def __init__(self, reports: bool = True) -> None:
        self._alarms: list[tuple[float, int, Hashable]] = []
        self._set_for: float | None = None
        self._count = 0
        self._rung = False
        self._turn_ends = 0.0
        self._heard_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._future: PromptFuture | None = None
        self._inotify: inotify_simple.INotify | None = None
        with contextlib.ExitStack() as stack:
            if reports:
                self._inotify = stack.enter_context(_inotify())
            self._epoll = stack.enter_context(_epoll())
            self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            stack.callback(os.close, self._bell)
            self._timer = stack.enter_context(contextlib.closing(_timer()))
            for fd in (
                self._bell,
                self._timer.fileno(),
                *([self._inotify.fileno()] if self._inotify else []),
            ):
                self._epoll.register(fd, select.EPOLLIN)
            self._open = stack.pop_all()

    def close(self) -> None:
        """Close every fd; a second call does nothing."""
        self._leave()
        self._open.close()

    def at_home(self, close: Callable[[], None]) -> None:
        """Call `close` in the thread of the loop that waits for this, if there is one."""
        if self._loop is None or self._loop.is_closed():
            close()
        else:
            self._loop.call_soon_threadsafe(close)

    def fileno(self) -> int:
        """
        The fd (epoll) that is readable when there is something to read, a deadline has passed, or
        the bell was rung.
        """
        return self._epoll.fileno()

    # -- watches

    def watch(self, directory_fd: int, mask: int, names: Collection[str] | None = None) -> int:
        """
        Watch a directory, whatever its name is or will be.

        Args:
            directory_fd (int): May be closed afterwards.
            mask (int): Of MODIFY, CLOSE_WRITE, DELETE, MOVED_FROM, MOVED_TO and MASK_ADD.
            names: The files in it that matter; others may be reported too. None for all.
        Returns:
            int: The watch, as `read` will name it; -1 where there is no inotify.
        Raises:
            OutOfWatchesError: If there are as many watches as the kernel allows.
            SpoolError: If it can't be watched.
        """
        if self._inotify is None:
            return -1
        try:
            # By fd, because the name may belong to another directory by now.  inotify_add_watch(2)
            # only takes a path.
            return int(self._inotify.add_watch(f"{OUR_FDS}/{directory_fd}", mask | ONLYDIR))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                name = _watch_limit()
                sentence = (
                    f"the limit of {_limit(name)} watches for this user is reached (sysctl {name})"
                )
                raise OutOfWatchesError(
                    f"unable to watch one more directory: {sentence}", error.errno
                ) from error
            raise SpoolError(
                f"unable to watch a directory: {error.strerror}", error.errno
            ) from error

    def unwatch(self, watch: int) -> None:
        """Remove a watch, unless the kernel has already removed it."""
        if self._inotify is not None and watch >= 0:
            with contextlib.suppress(OSError):
                self._inotify.rm_watch(watch)

    def read(self) -> list[inotify_simple.Event]:
        """
        What has changed since the last time.

        Returns:
            list: (wd, mask, cookie, name) of all waiting events, up to 64 KiB of them.
        """
        if self._inotify is None:
            return []
        try:
            data = os.read(self._inotify.fileno(), READ_BYTES)
        except BlockingIOError:
            return []
        events: list[inotify_simple.Event] = inotify_simple.parse_events(data)
        return events

    # -- deadlines

    def alarm(self, when: float, name: Hashable) -> None:
        """Make `passed` return a name at a time on the monotonic clock."""
        self._count += 1
        heapq.heappush(self._alarms, (when, self._count, name))
        self._set_timer()

    def passed(self) -> list[Hashable]:
        """The names whose time has come, once for each alarm."""
        if not self._alarms:
            return []
        found = []
        now = time.monotonic()
        while self._alarms and self._alarms[0][0] <= now:
            found.append(heapq.heappop(self._alarms)[2])
        if found:
            self._set_timer()
        return found

    def _set_timer(self) -> None:
        when = self._alarms[0][0] if self._alarms else None
        if when == self._set_for:
            return
        self._set_for = when
        # Rounded up, so that it has passed when we are woken; 0 disarms, and setting a timer takes
        # back its readability.
        self._timer.set(0 if when is None else max(1, int(when * 1e9) + 1))

    # -- waiting

    def ring(self, waits: bool) -> None:
        """Make `fileno()` readable because its owner has work to do, or unreadable again."""
        if waits != self._rung:
            self._rung = waits
            if waits:
                os.eventfd_write(self._bell, 1)
            else:
                os.eventfd_read(self._bell)

    def wait(self, timeout_s: float | None) -> bool:
        """Sleep until `fileno()` is readable; False if the time is over first."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._epoll.poll(None if left_s is None else min(left_s, LONGEST_WAIT_S)):
                return True
            if left_s is not None and left_s <= LONGEST_WAIT_S:
                return False

    async def readable(self, timeout_s: float | None = None) -> bool:
        """As `wait`, on the event loop that runs."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._leave()
            loop.add_reader(self.fileno(), self._hear)
            self._loop = loop
        future = self._future = PromptFuture(loop=loop)
        try:
            return await done(future, timeout_s)
        finally:
            self._future = None
            self._turn_ends = time.monotonic() + TURN_S

    def _hear(self) -> None:
        """The loop's own callback. It stays there between two waits, until it has no task."""
        if self._future is None:
            self._leave()
        elif self._loop is not None and time.monotonic() - self._heard_s < FAST_S:
            self._loop.call_later(GATHER_S, self._go_on)
            self._leave()
        else:
            self._go_on()

    def _go_on(self) -> None:
        if self._future is not None:
            self._future.go_on(True)
        self._heard_s = time.monotonic()

    def _leave(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self.fileno())
        self._loop = None

    async def turn(self) -> float:
        """Let the loop's other tasks run if our turn is over; return when it is, monotonic."""
        if time.monotonic() >= self._turn_ends:
            await asyncio.sleep(0)
            self._turn_ends = time.monotonic() + TURN_S
        return self._turn_ends


def open_watcher(reports: bool) -> tuple[Watcher, str | None]:
    """
    A watcher, and None; where inotify can't be used, one without inotify, and why.
    """
    try:
        return Watcher(reports), None
    except NoInotifyError as error:
        return Watcher(reports=False), str(error)


def close_when_dropped(
    owner: object, close: Callable[[], None], name: str
) -> weakref.finalize[Any, Any]:
    """
    Close what an owner of fds has opened if it is dropped without being closed, and warn.

    Returns:
        finalize: To be detached by the owner's `close`.
    """
    late = weakref.finalize(owner, _close_late, close, name)
    late.atexit = False
    return late


def _close_late(close: Callable[[], None], name: str) -> None:
    warnings.warn(f"{name} was not closed", ResourceWarning, stacklevel=2)
    close()


class PromptFuture(asyncio.Future[bool]):
    """
    A future whose task can go on inside of a callback of the loop: a turn of the loop later is a
    quarter of the time from a write to its subscriber.
    """

    _waiter: tuple[Callable[[Any], object], contextvars.Context | None] | None = None

    def add_done_callback(
        self, fn: Callable[[Any], object], /, *, context: contextvars.Context | None = None
    ) -> None:
        """As of any future; the task that awaits it calls this."""
        self._waiter = fn, context
        super().add_done_callback(fn, context=context)

    def go_on(self, result: bool) -> None:
        """Set the result, and run the task at once; to be called where no task runs."""
        if self.done():
            return
        fn, context = self._waiter or (None, None)
        if fn is None or context is None or not self.remove_done_callback(fn):
            self.set_result(result)
            return
        self.set_result(result)
        context.run(fn, self)


def set_done(future: asyncio.Future[bool], result: bool) -> None:
    """Set the result of a future, unless it has one or was cancelled."""
    if not future.done():
        future.set_result(result)


async def done(future: asyncio.Future[bool], timeout_s: float | None) -> bool:
    """The result of a future; False if the time is over first (None: no limit)."""
    if timeout_s is None:
        return await future
    # Not asyncio.wait_for: it may swallow a cancellation, up to Python 3.11.
    timer = future.get_loop().call_later(timeout_s, set_done, future, False)
    try:
        return await future
    finally:
        timer.cancel()


def _epoll() -> select.epoll:
    try:
        return select.epoll()
    except OSError as error:
        raise SpoolError(f"unable to make an epoll fd: {error.strerror}", error.errno) from error


def _timer() -> Timer:
    try:
        return Timer()
    except OSError as error:
        raise SpoolError(f"unable to make a timer: {error.strerror}", error.errno) from error


def _inotify() -> inotify_simple.INotify:
    if not os.path.isdir(OUR_FDS):
        raise NoInotifyError(f"unable to use inotify: there is no {OUR_FDS}")
    try:
        return inotify_simple.INotify(nonblocking=True)
    except OSError as error:
        if error.errno == errno.EMFILE:
            name = "fs.inotify.max_user_instances"
            sentence = (
                f"the limit of {_limit(name)} inotify instances for this user (sysctl {name}),"
                " or of open files, is reached"
            )
            raise NoInotifyError(f"unable to use inotify: {sentence}", error.errno) from error
        raise SpoolError(f"unable to use inotify: {error.strerror}", error.errno) from error
