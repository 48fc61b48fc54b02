"""
What followers have open: each its own, or those of a spool on one event loop a hub; 1,000 tasks
with an inotify instance each would use up a user's 128.

Knows: which share watches what, the event loop.  Must not know: runs, or what an event means.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import resource
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from typing import Protocol, TypeVar

import inotify_simple

from ..spool import format
from . import descriptors
from .descriptors import IGNORED, MASK_ADD, OVERFLOW, TURN_S, PromptFuture, done, set_done

# As the kernel's queue: a follower whose task does not ask for its events has no more in memory.
MOST_HEARD = 16_384
ASKED = "poll_s asks for it"
OVERFLOWED = inotify_simple.Event(-1, OVERFLOW, 0, "")


class Opened:
    """
    All that a follower has open.

    Args:
        spool_fd (int): The spool's, which belongs to it from now on.
        reports (bool): Whether to use inotify where it works.

    Attributes:
        silent (str): Why inotify is not used, in some words; None where it is.
        is_granted (bool): Whether the kernel granted what was asked of it.
    """

    def __init__(self, spool_fd: int, reports: bool) -> None:
        self.spool_fd = spool_fd
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, spool_fd)
            self.streams = OpenStreams()
            stack.callback(self.streams.close)
            name = descriptors.silent_filesystem(spool_fd) if reports else None
            self.watcher, why = descriptors.open_watcher(reports and name is None)
            self.is_granted = why is None
            stack.callback(self.watcher.close)
            self.silent = f"inotify may be silent on {name}" if name else why
            self.silent = self.silent if reports else ASKED
            self._open = stack.pop_all()

    def close(self) -> None:
        """Close everything; a second call does nothing."""
        self._open.close()

    def drop(self) -> None:
        """Close it from any thread: the garbage collector runs in some of them."""
        self.watcher.at_home(self.close)


class OpenStreams:
    """
    The fds of the streams that were read last: opening one for each event costs twice the CPU
    (measured, 5,000 lines/s).

    Args:
        most (int): How many are kept; None for half of what this process may open.
    """

    def __init__(self, most: int | None = None) -> None:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = most or (
            4_096 if soft == resource.RLIM_INFINITY else max(8, min(4_096, soft // 2))
        )
        self._fds: OrderedDict[tuple[Hashable, str], int] = OrderedDict()

    def get(self, run_id: Hashable, stream: str, opened: Callable[[], int]) -> int:
        """Its fd, made by `opened` if there is none; it may be closed by the next call."""
        name = (run_id, stream)
        fd = self._fds.get(name)
        if fd is None:
            while len(self._fds) >= self._most:
                os.close(self._fds.popitem(last=False)[1])
            self._fds[name] = fd = opened()
        else:
            self._fds.move_to_end(name)
        return fd

    def drop(self, run_id: Hashable) -> None:
        """Close what is open of a run."""
        for stream in (*format.STREAMS, format.TIMELINE):
            fd = self._fds.pop((run_id, stream), None)
            if fd is not None:
                os.close(fd)

    def close(self) -> None:
        """Close all of them."""
        while self._fds:
            os.close(self._fds.popitem()[1])


# -- a hub, and the shares of it

Name = tuple[asyncio.AbstractEventLoop, int, int]
_hubs: dict[Name, Hub] = {}


def share(spool_fd: int, reports: bool) -> Share:
    """
    A share of the hub of a spool on the running event loop; the arguments are those of `Opened`.

    Where the kernel granted that hub no inotify instance, each new share asks again, and the hub
    has a successor if one is granted.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, spool_fd)
        loop = asyncio.get_running_loop()
        for dead in [hub for hub in _hubs.values() if hub.loop.is_closed()]:
            dead.close()  # its tasks were never ended
        found = os.fstat(spool_fd)  # no other directory has that number while this one is open
        name = (loop, found.st_dev, found.st_ino)
        hub = _hubs.get(name)
        if hub is None or not hub.opened.is_granted:
            stack.pop_all()
            new = Hub(name, spool_fd)
            if hub is None or new.opened.is_granted:
                _hubs[name] = hub = new
            else:
                new.close()
    return Share(hub, reports)


class Hub:
    """
    What the followers of a spool on one event loop have open, and which of them listen to what.

    Args:
        name (tuple): Its event loop, and the device and the inode of the spool.
        spool_fd (int): As for `Opened`.
    """

    def __init__(self, name: Name, spool_fd: int) -> None:
        self._name = name
        self.loop = name[0]
        self.opened = Opened(spool_fd, reports=True)
        self._shares: set[Share] = set()
        self._watched: dict[int, set[Share]] = {}
        self._listeners: dict[tuple[int, str | None], dict[Share, int]] = {}
        self._waiting = 0
        self._is_reading = False
        self._turn_ends: float | None = None
        self._heard_s = 0.0
        self.is_open = True

    def close(self) -> None:
        """Close everything; a second call does nothing."""
        if self.is_open:
            self.is_open = False
            self._leave()
            if _hubs.get(self._name) is self:
                del _hubs[self._name]
            self.opened.close()

    def join(self, share: Share) -> None:
        """Count a share in: the hub is open as long as there is one."""
        self._shares.add(share)

    def leave(self, share: Share) -> None:
        """Count it out; its watches were removed."""
        self._shares.discard(share)
        if not self._shares:
            self.close()

    # -- watches

    def watch(
        self, share: Share, directory_fd: int, mask: int, names: Collection[str] | None
    ) -> int:
        """As `Watcher.watch`, for a share; it hears of these names alone."""
        watch = self.opened.watcher.watch(directory_fd, mask | MASK_ADD)
        if watch >= 0:
            self._watched.setdefault(watch, set()).add(share)
            for name in (None,) if names is None else names:
                self._listeners.setdefault((watch, name), {})[share] = mask
        return watch

    def unwatch(self, share: Share, watch: int, names: Collection[str] | None) -> None:
        """Remove a watch of a share, and the kernel's with the last one."""
        for name in (None,) if names is None else names:
            listeners = self._listeners.get((watch, name), {})
            listeners.pop(share, None)
            if not listeners:
                self._listeners.pop((watch, name), None)
        watching = self._watched.get(watch, set())
        watching.discard(share)
        if not watching and self._watched.pop(watch, None) is not None and self.is_open:
            self.opened.watcher.unwatch(watch)

    def read(self) -> set[Share]:
        """Take the kernel's events, each to the shares that listen to it; returns these shares."""
        heard = set()
        for event in self.opened.watcher.read():
            watch, mask, _, name = event
            if mask & OVERFLOW:
                for share in self._shares:
                    share.hear(OVERFLOWED)
                heard |= self._shares
            elif mask & IGNORED:
                for share in self._watched.pop(watch, ()):
                    share.hear(event)
                    heard.add(share)
            else:
                for key in ((watch, None), (watch, name)):
                    for share, wanted in self._listeners.get(key, {}).items():
                        if mask & wanted:
                            share.hear(event)
                            heard.add(share)
        return heard

    # -- waiting

    def wait(self, more: int) -> None:
        """Count the shares that wait; while none does, the kernel keeps events and merges them."""
        self._waiting += more
        if self._waiting and not self._is_reading:
            self._is_reading = True
            self.loop.add_reader(self.opened.watcher.fileno(), self._hear)

    def _hear(self) -> None:
        """The loop's own callback: the tasks go on in it, or later where events come fast."""
        if not self._waiting:
            self._leave()
        elif self.loop.time() - self._heard_s < descriptors.FAST_S:
            self.loop.remove_reader(self.opened.watcher.fileno())
            self.loop.call_later(descriptors.GATHER_S, self._gathered)
        else:
            self._go_on()

    def _gathered(self) -> None:
        if self.is_open:
            self._is_reading = False
            self._go_on()
            self.wait(0)

    def _go_on(self) -> None:
        for share in self.read():
            share.wake(at_once=True)
        self._heard_s = self.loop.time()

    def _leave(self) -> None:
        if self._is_reading and not self.loop.is_closed():
            self.loop.remove_reader(self.opened.watcher.fileno())
        self._is_reading = False

    async def turn(self) -> float:
        """As `Watcher.turn`, for all shares: each delivers at least one event in a loop's turn."""
        if self._turn_ends is not None and time.monotonic() >= self._turn_ends:
            await asyncio.sleep(0)
        if self._turn_ends is None:
            self._turn_ends = time.monotonic() + TURN_S
            self.loop.call_soon(self._end_turn)
        return self._turn_ends

    def _end_turn(self) -> None:
        self._turn_ends = None


class Share:
    """
    One follower's share of a hub: to the follower it is a `Watcher`, and all that is open.

    Args:
        reports (bool): Whether it uses inotify; without, it has deadlines only.
    """

    def __init__(self, hub: Hub, reports: bool) -> None:
        self._hub = hub
        self._reports = reports
        self.spool_fd = hub.opened.spool_fd
        self.silent = hub.opened.silent if reports else ASKED
        self.streams = SharedStreams(hub.opened.streams)
        self._heard: list[inotify_simple.Event] = []
        self._passed: list[Hashable] = []
        self._watches: dict[int, Collection[str] | None] = {}
        self._alarms: dict[int, asyncio.TimerHandle] = {}
        self._count = itertools.count()
        self._future: PromptFuture | None = None
        self._closed = False
        hub.join(self)

    @property
    def watcher(self) -> Share:
        """Itself."""
        return self

    def close(self) -> None:
        """Leave the hub, and end the wait of a task; a second call does nothing."""
        self._closed = True
        self.wake()
        for watch in [*self._watches]:
            self.unwatch(watch)
        for alarm in self._alarms.values():
            alarm.cancel()
        self._alarms.clear()
        self.streams.close()
        self._hub.leave(self)

    def drop(self) -> None:
        """Close it from any thread: the garbage collector runs in some of them."""
        with contextlib.suppress(RuntimeError):  # a loop that is closed; its hub will be as well
            self._hub.loop.call_soon_threadsafe(self.close)

    # -- watches

    def watch(self, directory_fd: int, mask: int, names: Collection[str] | None = None) -> int:
        """As `Watcher.watch`."""
        if not self._reports:
            return -1
        watch = self._hub.watch(self, directory_fd, mask, names)
        if watch >= 0:
            self._watches[watch] = names
        return watch

    def unwatch(self, watch: int) -> None:
        """Remove a watch."""
        if watch in self._watches:
            self._hub.unwatch(self, watch, self._watches.pop(watch))

    def hear(self, event: inotify_simple.Event) -> None:
        """Take an event of the kernel; the hub wakes the task then."""
        if event.mask & IGNORED:
            self.unwatch(event.wd)
        if len(self._heard) >= MOST_HEARD:
            self._heard = [OVERFLOWED]
        elif event not in self._heard[-1:]:  # as the kernel merges what it repeats
            self._heard.append(event)

    def read(self) -> list[inotify_simple.Event]:
        """As `Watcher.read`."""
        if self._closed:
            raise ValueError("unable to follow: the follower is closed")
        if not self._heard:
            for share in self._hub.read():
                share.wake()
        heard, self._heard = self._heard, []
        return heard

    # -- deadlines

    def alarm(self, when: float, name: Hashable) -> None:
        """As `Watcher.alarm`."""
        number = next(self._count)
        after_s = max(0.0, when - time.monotonic())
        self._alarms[number] = self._hub.loop.call_later(after_s, self._pass, number, name)

    def _pass(self, number: int, name: Hashable) -> None:
        del self._alarms[number]
        self._passed.append(name)
        self.wake()

    def passed(self) -> list[Hashable]:
        """As `Watcher.passed`."""
        passed, self._passed = self._passed, []
        return passed

    # -- waiting

    def wake(self, at_once: bool = False) -> None:
        """Let the task that waits go on; `at_once` where no task runs."""
        if self._future is not None and at_once:
            self._future.go_on(True)
        elif self._future is not None:
            set_done(self._future, True)

    async def readable(self, timeout_s: float | None = None) -> bool:
        """As `Watcher.readable`."""
        if self._heard or self._passed:
            return True
        if timeout_s is not None and timeout_s <= 0:
            return False  # a turn of the loop would cost more than what is looked for
        if self._future is not None:
            raise RuntimeError("unable to follow: another task waits for this follower")
        self._future = PromptFuture(loop=self._hub.loop)
        self._hub.wait(1)
        try:
            return await done(self._future, timeout_s)
        finally:
            self._future = None
            self._hub.wait(-1)

    async def turn(self) -> float:
        """As `Watcher.turn`."""
        return await self._hub.turn()


class SharedStreams:
    """A follower's streams among those of its hub: they have one limit together."""

    def __init__(self, streams: OpenStreams) -> None:
        self._streams = streams
        self._runs: set[str] = set()

    def get(self, run_id: str, stream: str, opened: Callable[[], int]) -> int:
        """As `OpenStreams.get`."""
        self._runs.add(run_id)
        return self._streams.get((id(self), run_id), stream, opened)

    def drop(self, run_id: str) -> None:
        """As `OpenStreams.drop`."""
        self._runs.discard(run_id)
        self._streams.drop((id(self), run_id))

    def close(self) -> None:
        """Close all of them."""
        for run_id in [*self._runs]:
            self.drop(run_id)


# -- what a follower does with it for a run

Run = TypeVar("Run", contravariant=True)


class FollowerServices(Protocol[Run]):
    """A run's follower: which streams are `wanted`, of `chunk` bytes at once, at most."""

    spool_fd: int
    chunk: int
    wanted: tuple[str, ...]
    streams: OpenStreams | SharedStreams

    def watch(self, run: Run, fd: int) -> None:
        """Watch a run directory from now on."""

    def unwatch(self, run: Run) -> None:
        """Stop watching it."""

    def forget(self, run: Run) -> None:
        """Drop the run."""

    def look_again(self, run: Run, after_s: float) -> None:
        """Look at the run again after some seconds."""
