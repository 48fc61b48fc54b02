"""
Follower: what is new in a spool since its scheduler last looked.

Knows: which runs there are, whose turn it is.  Must not know: the files of a run, or what is done
with the events.
"""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import AsyncIterator, Iterable
from typing import Any

from ..errors import SpecError, SpoolError
from ..model import cursor as cursors
from ..model.events import Event
from ..model.spec import is_run_id
from ..program.fds import owned
from ..spool import format
from . import hub
from .descriptors import (
    CLOSE_WRITE,
    DELETE,
    IGNORED,
    MODIFY,
    MOVED_FROM,
    MOVED_TO,
    OVERFLOW,
    OutOfWatchesError,
    Watcher,
    close_when_dropped,
)
from .followed import CHUNK, HINT_ENDED, HINT_LOOK, SHORT, FollowedRun
from .progress import Progress
from .turns import Turns

LONGEST_S = 1e10  # as the longest time of a spec
POLL_S = 1.0  # where inotify is silent: each look at 1,000 live runs costs some 80 ms of CPU
# How long the kernel's queue may fill while there is work: 5,000 events/s fill it in 3 s.
GATHER_S = 0.001
# Reads of 64 KiB after the time is over: more than the kernel's queue holds. Without a limit, a
# flood of events of runs that are not followed would never end.
LATE_LOOKS = 64
POLL = object()  # the name of the alarm for the next poll


class Follower:
    """
    The events of a spool's runs: every event once, those of one run in order.

    Iterate with `for` or `async for`; or wait for `fileno()` in another event loop and call
    `next(0)`. A follower belongs to one thread.

    Args:
        path (str): The spool's; made if it is missing.
        cursor (dict): The value of `cursor` that the scheduler committed last; None for all live
            runs and all ended runs that were not collected.
        runs (iterable): The ids to follow; None for all. With ids, the iteration ends when all of
            them have ended or were collected earlier.
        streams (iterable): The streams to read.
        poll_s (float): Look at everything at this interval, in seconds, instead of using inotify;
            None uses inotify where it works.
        shared (bool): Share what it has open with the other followers of the spool on the running
            event loop, as those of `chaperone.aio` do; `next` and `fileno` do not work then.

    Attributes:
        polling (str): Why the follower polls, in one sentence; None while it uses inotify.
    Raises:
        SpecError: If the cursor, the streams or the seconds are invalid.
        SpoolError: If the spool can't be followed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        cursor: object = None,
        runs: Iterable[str] | None = None,
        streams: Iterable[str] = format.STREAMS,
        poll_s: float | None = None,
        shared: bool = False,
    ) -> None:
        entries = cursors.checked(cursor)
        self.path = os.fspath(path)
        self.wanted = wanted = tuple(streams)
        if not set(wanted) <= set(format.STREAMS):
            raise SpecError(f"unable to follow streams {wanted!r}: want stdout, stderr or both")
        if poll_s is not None and not 0 < poll_s <= LONGEST_S:
            want = f"want more than 0 and at most {LONGEST_S:g} s"
            raise SpecError(f"unable to poll every {poll_s!r} s: {want}")
        self.polling: str | None = None
        self.chunk = CHUNK  # bytes of one Output, at most
        named = cursors.named(runs)
        self._named = None if named is None else frozenset(named)
        others = {name: entry for name, entry in entries.items() if not self._is_named(name)}
        self._progress = Progress(others)
        self._runs: dict[str, FollowedRun] = {}
        self._by_watch: dict[int, FollowedRun] = {}
        self._turns = Turns()
        self._taken: set[str] = set()
        self._spool_watch = self._ended_watch = -1
        self._gathered = 0.0
        self._removed = self._owned = self._unsure = False
        self._lent: Watcher | None = None  # the one whose `fileno()` another loop waits for
        self._poll_s = poll_s or POLL_S
        spool_fd = format.open_spool(self.path, create=True)
        self._opened = (hub.share if shared else hub.Opened)(spool_fd, poll_s is None)
        try:
            self.spool_fd = self._opened.spool_fd
            self.streams = self._opened.streams
            self._watcher = self._opened.watcher
            if self._opened.silent is not None:
                self._poll(self._opened.silent, announced=poll_s is not None)
            else:
                self._watch_spool()
            for run_id in entries.keys() - others.keys() | (self._named or set()):
                entry, is_in = entries.get(run_id, {}), run_id in entries
                run = FollowedRun(self, run_id, entry, asked_for=True, if_collected=is_in)
                self._runs[run_id] = run
                self._progress.add(run)
            self._begin()
        except BaseException:
            self._opened.close()
            raise
        name = f"a follower of spool {self.path!r}"
        self._unclosed = close_when_dropped(self, self._opened.drop, name)

    def __enter__(self) -> Follower:
        self._owned = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every watch and fd; the cursor can still be read."""
        self._unclosed.detach()
        self._opened.close()
        self.spool_fd = -1  # the number may be another file's by now

    def _is_named(self, run_id: str) -> bool:
        return self._named is None or run_id in self._named

    # -- how far it has come

    @property
    def cursor(self) -> dict[str, Any]:
        """
        The cursor up to the last event that was delivered, as a new dict; the cost grows with the
        number of runs in it.
        """
        return self._progress.cursor()

    def entry(self, run_id: str) -> dict[str, Any] | None:
        """One run's part of `cursor`, to be kept in a row of its own; None if it is not in it."""
        run = self._progress.get(run_id)
        return None if run is None else dict(run.entry)

    @property
    def uncollected(self) -> list[str]:
        """
        The runs whose ending was delivered, by this follower or by the one whose cursor was passed
        in, and that are not collected; also those whose entry `collect` waits for.
        """
        return self._progress.uncollected()

    def is_uncollected(self, run_id: str) -> bool:
        """Whether a run is in `uncollected`; costs the same however many there are."""
        return self._progress.is_uncollected(run_id)

    def collect(self, run_id: str) -> None:
        """
        Remove an ended run from .ended/, then from the cursor.

        Call it after the ending was committed together with the cursor. A run that has just ended,
        or that was lost and not reaped, is not in .ended/ yet: its entry is removed as soon as it
        appears, and the run stays in the cursor until then.

        Raises:
            SpecError: If its ending was not delivered; not if another has collected it.
        """
        run = self._progress.collected(self.spool_fd, run_id)
        if run is not None:
            self.forget(run)

    # -- delivering

    def __iter__(self) -> Follower:
        return self

    def __next__(self) -> Event:
        event = self.next()
        if event is None:
            raise StopIteration
        return event

    def next(self, timeout: float | None = None) -> Event | None:
        """
        The next event.

        Args:
            timeout (float): Seconds to wait; 0 does not wait, None waits as long as it takes.
        Returns:
            Event: None when the time is over, or when all runs that were named have ended.
        """
        watcher = self._own_watcher()
        deadline = None if timeout is None else time.monotonic() + timeout
        late = 0
        while True:
            event = self._take()
            if event is not None or self.is_over():
                return event
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            late += left == 0
            if late > LATE_LOOKS or not watcher.wait(left) and left == 0:
                return None

    def is_over(self) -> bool:
        """Whether no event can come any more: all runs that were named have ended."""
        return self._named is not None and not any(
            run_id in self._runs and not self._runs[run_id].is_over() for run_id in self._named
        )

    async def __aiter__(self) -> AsyncIterator[Event]:
        """
        The events, on the running event loop. At the end, or when cancelled, it closes the
        follower, unless a `with` block does.
        """
        try:
            while (event := await self.anext()) is not None:
                yield event
        finally:
            if not self._owned:
                self.close()

    async def anext(self, timeout: float | None = None) -> Event | None:
        """As `next`, on the running event loop, whose other tasks run in a backlog too."""
        deadline = None if timeout is None else time.monotonic() + timeout
        late = 0
        while True:
            event = self._take(await self._watcher.turn())
            if event is not None or self.is_over():
                return event
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            late += left == 0
            if late > LATE_LOOKS:
                return None
            # A backlog never waits for the kernel.
            if not self._turns and not await self._watcher.readable(left) and left == 0:
                return None

    def fileno(self) -> int:
        """An fd for any event loop, readable whenever an event may be ready, also of a backlog."""
        self._lent = self._own_watcher()
        self._ring(self._lent)
        return self._lent.fileno()

    def _own_watcher(self) -> Watcher:
        if isinstance(self._watcher, Watcher):
            return self._watcher
        raise TypeError("unable to wait: this follower belongs to an event loop; use await")

    def _take(self, until: float | None = None) -> Event | None:
        """The next event that needs no waiting; None when there is none, or the time is over."""
        try:
            if not self._turns or time.monotonic() - self._gathered >= GATHER_S:
                self._gather()
            while self._turns:
                run = self._turns.take()
                try:
                    event = run.next_event()
                finally:
                    self._turns.back(run)
                if event is not None:
                    self._progress.add(run)
                    return event
                if until is not None and time.monotonic() >= until:
                    return None
            if self._removed:
                raise SpoolError(
                    f"unable to follow spool {self.path!r} any longer: it was removed", errno.ENOENT
                )
            return None
        finally:
            if self._lent is not None:
                self._ring(self._lent)

    def _ring(self, watcher: Watcher) -> None:
        watcher.ring(bool(self._turns) or self._unsure)

    # -- what may be new

    def _gather(self) -> None:
        """
        Take the kernel's events. If that fails for now, look at everything the next time, because
        the kernel reports nothing twice.
        """
        self._gathered = time.monotonic()
        try:
            if self._unsure:
                self._look_everywhere()
            self._hear()
            for run_id in [*self._taken]:
                self._taken_away(run_id)
            self._unsure = False
        except OSError as error:
            self._unsure = error.errno in SHORT
            raise

    def _hear(self) -> None:
        """Turn the kernel's events into hints; many events of one run become one hint."""
        for name in self._watcher.passed():
            if name is POLL:
                self._watcher.alarm(time.monotonic() + self._poll_s, POLL)
                self._look_everywhere()
            elif isinstance(name, FollowedRun) and self._runs.get(name.run_id) is name:
                self._turns.give(name, HINT_LOOK)
        for watch, mask, _, name in self._watcher.read():
            run = self._by_watch.get(watch)
            if run is not None:
                self._turns.give(run, run.hint(mask, name))
                if mask & IGNORED:
                    self._by_watch.pop(watch, None)
            elif mask & OVERFLOW:
                self._look_everywhere()
            elif watch in (self._spool_watch, self._ended_watch):
                self._spool_changed(watch, mask, name)

    def _taken_away(self, run_id: str) -> None:
        """Another process has collected the run, or gc has deleted it: forget it after its end."""
        run = self._runs.get(run_id)
        self._taken.discard(run_id)
        if run is not None and not run.is_over():
            self._taken.add(run_id)
        elif run is not None and format.where_entered(self.spool_fd, run_id) is None:
            self.forget(run)

    def _spool_changed(self, watch: int, mask: int, name: str) -> None:
        if mask & IGNORED:
            self._removed = True
        elif not is_run_id(name):
            return
        elif watch == self._ended_watch and mask & DELETE:
            self._taken_away(name)
        elif mask & MOVED_TO:
            self._taken.discard(name)
            self._appeared(name, HINT_LOOK | (HINT_ENDED if watch == self._ended_watch else 0))
        elif name in self._runs:
            self._turns.give(self._runs[name], HINT_LOOK)

    def _appeared(self, run_id: str, hints: int) -> None:
        if hints & HINT_ENDED and run_id in self._progress.collecting:
            self.collect(run_id)
            return
        run = self._runs.get(run_id)
        if run is None:
            if not self._is_named(run_id):
                return
            # Those that were asked for are in `_runs` until they are collected.
            run = self._runs[run_id] = FollowedRun(self, run_id, {})
        self._turns.give(run, hints)

    def _look_everywhere(self) -> None:
        """Events were lost, or inotify is silent: look at every run that has not ended."""
        entered = self._list()
        self._taken = self._runs.keys() - entered
        self._removed = self._removed or os.fstat(self.spool_fd).st_nlink == 0
        for run in self._runs.values():
            if not run.has_ended():
                self._turns.give(run, HINT_LOOK)

    def _begin(self) -> None:
        """Give live runs the first turns, then ended ones, then those that the cursor alone has."""
        self._list()
        for run in list(self._runs.values()):
            if not run.queued and run.has_ended():
                self.forget(run)  # it was collected, or deleted, after the cursor was committed
            elif not run.queued:
                self._turns.give(run, HINT_LOOK)

    def _list(self) -> set[str]:
        """Which runs have an entry; each gets a turn."""
        entered = set()
        for run_id, where in format.entered(self.spool_fd, self._named):
            self._appeared(run_id, HINT_LOOK | (HINT_ENDED if where == format.ENDED else 0))
            entered.add(run_id)
        return entered

    # -- watching

    def _watch_spool(self) -> None:
        try:
            mask = MOVED_TO | MOVED_FROM | DELETE
            self._spool_watch = self._watcher.watch(self.spool_fd, mask, self._named)
            with owned(format.open_entries(self.spool_fd, format.ENDED)) as fd:
                self._ended_watch = self._watcher.watch(fd, MOVED_TO | DELETE, self._named)
        except OutOfWatchesError as error:
            self._poll(str(error))

    def watch(self, run: FollowedRun, fd: int) -> None:
        """Watch a run directory; poll if the kernel grants no further watch."""
        mask = CLOSE_WRITE | MOVED_TO | (MODIFY if self.wanted else 0)
        try:
            run.watch = self._watcher.watch(fd, mask)
        except OutOfWatchesError as error:
            self._poll(str(error))
        if run.watch >= 0:
            self._by_watch[run.watch] = run

    def unwatch(self, run: FollowedRun) -> None:
        """Forget a run's watch."""
        if self._by_watch.pop(run.watch, None) is not None:
            self._watcher.unwatch(run.watch)
        run.watch = -1

    def forget(self, run: FollowedRun) -> None:
        """Drop the run; it may appear again."""
        run.hints = 0
        self._taken.discard(run.run_id)
        self._progress.drop(run)
        if self._runs.get(run.run_id) is run:
            del self._runs[run.run_id]

    def look_again(self, run: FollowedRun, after_s: float) -> None:
        """Give a run a turn after some seconds."""
        self._watcher.alarm(time.monotonic() + after_s, run)

    def _poll(self, why: str, announced: bool = False) -> None:
        if self.polling is not None:
            return
        self.polling = f"looking at spool {self.path!r} every {self._poll_s:g} s: {why}"
        self._watcher.alarm(time.monotonic() + self._poll_s, POLL)
        if not announced:
            warnings.warn(self.polling, RuntimeWarning, stacklevel=4)
